"""The `evaclip` command: use models and their files without the pipeline that makes them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Option, Typer
from typer.exceptions import TyperException

from evaclip_model.choices import Form, Precision
from evaclip_model.cpu.allocator import freed_memory_kept
from evaclip_model.errors import InputError, escape_control
from evaclip_model.model.model_config import ALIASES, CONFIG_FILE, ModelConfig, list_models
from evaclip_model.reading.urls import read_text

# torch and what needs it are imported by the commands: it is slow, and neither the help nor most
# mistakes need it.
if TYPE_CHECKING:
    from evaclip_model.model.clip import EvaClip

MOST_NAMED = 10
"""Of what cannot be encoded, on the terminal; `embed` writes all of it beside its vectors."""

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
    except (InputError, TyperException, OSError) as error:
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

    from evaclip_model.zeroshot.encode_chunks import (
        EvaSubject,
        embed_texts,
        image_features,
        image_files,
    )

    files = image_files(images)
    model = open_named_model(model_name, weights, device, precision)
    said = _Progress("images", len(files))
    read, features, unreadable = image_features(model, files, batch_size, said)
    texts = embed_texts(EvaSubject(model), [template.replace("{}", label) for label in labels])
    cosines = (features @ texts.T).to(model.logit_scale.device)
    shares = model.compute_probabilities(cosines).detach().cpu()
    if files == [images]:
        for share, label in sorted(zip(shares[0].tolist(), labels, strict=True))[::-1]:
            print(f"{share:7.1%}  {label}")
    else:
        best, places = (values.tolist() for values in shares.max(dim=1))
        for file, share, place in zip(read, best, places, strict=True):
            print(f"{share:7.1%}  {labels[place]}  {escape_control(str(file))}")
    _warn_of_unreadable(iter(unreadable.items()), len(read))


@commands.command("embed")
def embed(
    inputs: Annotated[
        list[Path],
        Argument(metavar="INPUT", help="images, folders, .tar, .csv, .tsv, .jsonl, .parquet, .txt"),
    ],
    model_name: ModelName,
    out: Annotated[Path, Option(metavar="DIR", help="a folder, for a parquet file a part")],
    weights: Weights = None,
    device: Device = "cpu",
    precision: WeightsPrecision = "fp32",
    share: Annotated[str, Option(metavar="K/N", help="of N processes that share DIR")] = "1/1",
) -> None:
    """Write vectors of images and captions."""
    mine, _, of = share.partition("/")
    if not (mine.isdecimal() and of.isdecimal() and 0 < int(mine) <= int(of)):
        raise InputError(f"--share {share}: expected K/N, as 1/4 to 4/4 of four processes")
    if find_spec("pyarrow") is None:
        raise InputError("pyarrow writes the vectors: pip install pyarrow")

    from evaclip_model.zeroshot.embed_files import embed_inputs

    with freed_memory_kept():
        model = open_named_model(model_name, weights, device, precision)
        part, progress = (int(mine) - 1, int(of)), _Progress("rows")
        rows, unreadable = embed_inputs(model, inputs, out, share=part, progress=progress)
    if _warn_of_unreadable(unreadable, rows) and not rows:
        raise InputError("nothing can be encoded: see the reasons above")
    print(f"{rows:,} rows: {out}")


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
    from evaclip_model.weights.export import export_model
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
    for path in export_model(model, dest, form):
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


def _warn_of_unreadable(unreadable: Iterator[tuple[object, str]], readable: int) -> int:
    """Name some of what cannot be encoded; returns how much it is."""
    lines = [f"  {name} ({why})" for name, why in islice(unreadable, MOST_NAMED)]
    count = len(lines) + sum(1 for _ in unreadable)
    if count > MOST_NAMED:
        lines.append(f"  and {count - MOST_NAMED:,} more")
    if lines:
        first = f"{count:,} of {count + readable:,} cannot be read:"
        print(first, *map(escape_control, lines), sep="\n", file=sys.stderr)
    return count


class _Progress:
    """Says on stderr how far a long command is: in place on a terminal, else every ten seconds."""

    def __init__(self, what: str, total: int = 0) -> None:
        self._what, self._total = what, total
        self._started = self._said = time.monotonic()
        self._in_place = sys.stderr.isatty()

    def __call__(self, done: int, share: float | None = None) -> None:
        now, share = time.monotonic(), done / self._total if share is None else share
        is_due = now - self._said >= (0.2 if self._in_place else 10)
        if not (is_due or (share == 1 and self._said > self._started)):
            return
        self._said, spent = now, now - self._started
        start, end = ("\r\033[K", "\n" * (share == 1)) if self._in_place else ("", "\n")
        left = f"{share:.0%}, {timedelta(seconds=int(spent * (1 - share) / share))} left"
        line = f"{start}{done:,} {self._what}, {done / spent:,.1f} a second, {left}"
        print(line, end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
