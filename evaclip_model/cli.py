"""The `evaclip` command: use models and their files without the pipeline that makes them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option, Typer
from typer.exceptions import TyperException

from evaclip_model.choices import Form, Precision
from evaclip_model.cpu.allocator import freed_memory_kept
from evaclip_model.errors import InputError, escape_control, shorten_error
from evaclip_model.model.model_config import ALIASES, CONFIG_FILE, ModelConfig, list_models
from evaclip_model.reading.urls import read_text

# torch and what needs it are imported by the commands: it is slow, and neither the help nor most
# mistakes need it.
if TYPE_CHECKING:
    from torch import Tensor

    from evaclip_model.model.clip import EvaClip

MOST_NAMED = 10
"""Unreadable images named on the terminal; `embed` writes all of them to its file of names."""

_TOWER_FORMS = {"vision": "timm", "text": "transformers"}
"""Part of a model -> the form that holds this part alone."""

ModelName = Annotated[
    str,
    Option(
        "--model",
        metavar="DIR|NAME",
        help="a saved model's folder; or with --weights an architecture's name or JSON file",
    ),
]
Weights = Annotated[Path | None, Option(metavar="FILE", help="a checkpoint of any known layout")]
Device = Annotated[str, Option(help="such as cuda")]
BatchSize = Annotated[int, Option(min=1, help="images or captions at once")]
WeightsPrecision = Annotated[Precision, Option("--precision", help="dtype of the weights")]

commands = Typer(
    help="Use EVA-CLIP models and their files.",
    add_completion=False,
    rich_markup_mode=None,  # importing rich would take a third of the time that help needs
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 2 after a mistake of the user's."""
    try:
        status = commands(arguments, prog_name="evaclip", standalone_mode=False)
    except (InputError, TyperException, PermissionError) as error:
        text = error.format_message() if isinstance(error, TyperException) else str(error)
        print(f"evaclip: {escape_control(text)}", file=sys.stderr)
        return 2
    return status or 0


@commands.command("models")
def list_architectures() -> None:
    """List the architectures that ship."""
    from evaclip_model.training.cost import parameter_counts

    aliases = {name: alias for alias, name in ALIASES.items()}
    print(f"{'':<22}{'parameters':>14}{'image':>8}{'text':>7}{'px':>5}{'patch':>7}{'joint':>7}")
    for name in list_models():
        config = ModelConfig.load(name)
        counts = parameter_counts(config)
        image, text = counts["vision"] / 1e6, counts["text"] / 1e6
        print(
            f"{name:<22}{sum(counts.values()):>14,}{image:>7,.0f}M{text:>6,.0f}M"
            f"{config.vision.image_px:>5}{config.vision.patch_px:>7}{config.embed_dim:>7}"
            + (f"  = {aliases[name]}" if name in aliases else "")
        )


@commands.command("classify")
def classify_images(
    images: Annotated[Path, Argument(metavar="IMAGE", help="an image, or a folder of them")],
    labels: Annotated[list[str], Argument(metavar="LABEL", help="at least two captions")],
    model_name: ModelName,
    weights: Weights = None,
    device: Device = "cpu",
    batch_size: BatchSize = 64,
    precision: WeightsPrecision = "fp32",
    template: Annotated[
        str, Option(help="prompt around each label", show_default="the label alone")
    ] = "{}",
) -> None:
    """Say which label fits an image."""
    if len(set(labels)) < 2:
        raise InputError("give at least two different labels to choose from")
    if template.count("{}") != 1:
        raise InputError(f"template '{template}' must hold '{{}}' once, where the label goes")

    from evaclip_model.zeroshot.encode_chunks import image_features, image_files

    files = image_files(images)
    model = open_named_model(model_name, weights, device, precision)
    found = image_features(
        model, files, batch_size=batch_size, progress=_Progress("images", len(files))
    )
    shares = compute_label_probabilities(model, found.values, labels, template)
    if files == [images]:
        for share, label in sorted(zip(shares[0].tolist(), labels, strict=True))[::-1]:
            print(f"{share:7.1%}  {label}")
    else:
        best, places = (values.tolist() for values in shares.max(dim=1))
        for file, share, place in zip(found.files, best, places, strict=True):
            print(f"{share:7.1%}  {labels[place]}  {escape_control(str(file))}")
    _warn_of_unreadable(found.unreadable, len(files))


@commands.command("embed")
def embed(
    model_name: ModelName,
    out: Annotated[
        Path,
        Option(
            metavar="X.npy", help="unit vectors [N, E] in float32; X.json says what each row is of"
        ),
    ],
    images: Annotated[
        list[Path] | None, Argument(metavar="IMAGE", help="images, or folders of them")
    ] = None,
    text: Annotated[
        Path | None, Option(metavar="FILE", help="captions, one a line, instead of images")
    ] = None,
    weights: Weights = None,
    device: Device = "cpu",
    batch_size: BatchSize = 64,
    precision: WeightsPrecision = "fp32",
) -> None:
    """Write features of images or of captions."""
    if out.suffix != ".npy":
        raise InputError(f"--out {out}: features are written as .npy, end the name in it")
    if not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: the folder does not exist, make it first")
    if bool(images) == (text is not None):
        raise InputError("give images or folders of them, or --text FILE, and not both")

    from evaclip_model.zeroshot import encode_chunks as features

    names, about = _read_lines(text) if text is not None else [], {}
    given = (file for source in images or [] for file in features.image_files(source))
    files = list(dict.fromkeys(given))
    with freed_memory_kept():
        model = open_named_model(model_name, weights, device, precision)
        if text is not None:
            progress = _Progress("captions", len(set(names)))
            values = _encode_captions(model, names, batch_size=batch_size, progress=progress)
        else:
            progress = _Progress("images", len(files))
            found = features.image_features(model, files, batch_size=batch_size, progress=progress)
            values, names = found.values, list(map(str, found.files))
            about = {"unreadable": {str(file): why for file, why in found.unreadable.items()}}
            _warn_of_unreadable(found.unreadable, len(files))
    features.write_features(out, values, names, about)
    what = "images" if text is None else "captions"
    print(f"{len(names):,} {what}: {out}, {features.names_file(out)}")


def _read_lines(file: Path) -> list[str]:
    try:
        lines = read_text(file).removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as lines ({shorten_error(error)})") from None
    if lines == [""]:
        raise InputError(f"{file} is empty: expected one caption a line")
    return lines


@commands.command("convert")
def convert(
    source: Annotated[Path, Argument(metavar="SOURCE", help="a checkpoint of any known layout")],
    dest: Annotated[
        Path, Argument(metavar="DEST", help="a folder, or a .safetensors file of weights alone")
    ],
    form: Annotated[Form, Option("--as", help="whose names and files")],
    architecture: Annotated[
        str | None,
        Option(
            "--model",
            metavar="NAME",
            help="its architecture: a name or a JSON file (a saved model's folder says it itself)",
        ),
    ] = None,
    part: Annotated[
        Literal["all", "vision", "text"],
        Option(help="the tower that SOURCE holds, when it holds one alone"),
    ] = "all",
    allow_torchscript: Annotated[
        bool,
        Option(
            "--allow-torchscript", help="open OpenAI's archives, which hold code besides weights"
        ),
    ] = False,
    precision: WeightsPrecision = "fp32",
) -> None:
    """Write a checkpoint in another form."""
    if part != "all" and form != _TOWER_FORMS[part]:
        raise InputError(
            f"--part {part}: a tower alone can be written as "
            f"{_TOWER_FORMS[part]}, but {form} would need the other one, too"
        )
    if architecture is None and not (source / CONFIG_FILE).is_file():
        raise InputError(
            f"{source} does not say its architecture: name it with --model "
            "(`evaclip models` lists them)"
        )

    from evaclip_model.create import create_model, load_model
    from evaclip_model.weights.export import export_model, export_onnx
    from evaclip_model.weights.load import load_weights

    if part == "all":
        model, report = load_model(architecture or source, source, precision=precision)
    else:  # the other tower is there and is not written
        model = create_model(architecture or source, precision=precision, seed=0)
        report = load_weights(model, source, part=part, allow_torchscript=allow_torchscript)
    model.eval()
    print(f"{source}: {report}")
    if report.expected_gaps:
        gaps = ", ".join(report.expected_gaps[:2]) + ", …" * (len(report.expected_gaps) > 2)
        print(f"evaclip: not taken from the source, so at initial values: {gaps}", file=sys.stderr)
    for path in export_onnx(model, dest) if form == "onnx" else export_model(model, dest, form):
        print(path)


@commands.command("interpolate")
def interpolate(
    start: Annotated[Path, Argument(metavar="START", help="a checkpoint of END's architecture")],
    end: Annotated[Path, Argument(metavar="END", help="the tuned model: a saved model's folder")],
    weight: Annotated[float, Option(min=0, max=1, help="END's share of every weight")],
    out: Annotated[
        Path,
        Option("--out", "-o", metavar="DEST", help="a folder, or a .safetensors file of weights"),
    ],
) -> None:
    """Write the model between two, which keeps more of what the first one knew."""
    from evaclip_model.create import interpolate_weights
    from evaclip_model.weights.export import export_model

    for path in export_model(interpolate_weights(start, end, weight), out, "native"):
        print(path)


@commands.command("take-over")
def take_over(
    source: Annotated[
        Path, Argument(metavar="SOURCE", help="folder of a ZeRO-1, ZeRO-2 or universal one")
    ],
    job_file: Annotated[
        Path, Argument(metavar="TRAIN_JSON", help="the run to come, which then starts there")
    ],
) -> None:
    """Go on with a DeepSpeed training."""
    try:
        settings = json.loads(read_text(job_file))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{job_file} cannot be read as a training job ({error})") from None

    from evaclip_model.training.checkpoint.deepspeed_import import import_checkpoint
    from evaclip_model.training.config import CHECKPOINTS, TrainJob

    job = TrainJob.from_mapping(settings, where=str(job_file))
    location = job.checkpoints or job.run_dir / CHECKPOINTS
    architecture = ModelConfig.load(job.start_from)
    progress = import_checkpoint(source, location, job.train, architecture)
    print(f"{location}: step {progress.step:,} of {job.train.steps:,}")


def open_named_model(name: str, weights: Path | None, device: str, precision: Precision) -> EvaClip:
    """Open the model that the options name, in evaluation mode on its device."""
    import torch

    from evaclip_model.create import create_model, open_model

    if weights is not None:
        model = create_model(name, weights=weights, precision=precision).eval()
    elif name in (*list_models(), *ALIASES) and not Path(name).exists():
        raise InputError(
            f"--model {name} is an architecture: add --weights FILE, or give the folder "
            "of a saved model"
        )
    else:
        model = open_model(name, precision)
    try:
        return model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        first = str(error).splitlines()[0]
        raise InputError(f"--device {device} cannot be used here ({first})") from None


def compute_label_probabilities(
    model: EvaClip, images: Tensor, labels: Sequence[str], template: str
) -> Tensor:
    """Probabilities [N, L] of labels for image features [N, E]."""
    texts = _encode_captions(model, [template.replace("{}", label) for label in labels])
    cosines = (images @ texts.T).to(model.logit_scale.device)
    return model.compute_probabilities(cosines).detach().cpu()


def _encode_captions(model: EvaClip, captions: Sequence[str], **options: Any) -> Tensor:
    from evaclip_model.zeroshot.exact_ranks import encode_texts

    device, length = str(model.logit_scale.device), model.config.text.context_length
    return encode_texts(model, captions, context_length=length, device=device, **options)


def _warn_of_unreadable(unreadable: Mapping[Path, str], total: int) -> None:
    lines = [f"  {file} ({why})" for file, why in islice(unreadable.items(), MOST_NAMED)]
    if len(unreadable) > MOST_NAMED:
        lines.append(f"  and {len(unreadable) - MOST_NAMED:,} more")
    if lines:
        first = f"{len(unreadable):,} of {total:,} images cannot be read:"
        print(first, *map(escape_control, lines), sep="\n", file=sys.stderr)


class _Progress:
    """Says on stderr how far a long command is: in place on a terminal, else every ten seconds."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total = what, total
        self._started = self._said = time.monotonic()
        self._in_place = sys.stderr.isatty()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        is_end = done == self._total
        is_due = now - self._said >= (0.2 if self._in_place else 10)
        if not (is_due or (is_end and self._said > self._started)):
            return
        self._said = now
        rate = done / (now - self._started)
        start, end = ("\r\033[K", "\n" * is_end) if self._in_place else ("", "\n")
        line = f"{start}{done:,} of {self._total:,} {self._what}, {rate:,.1f} a second"
        print(line, end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
