"""The `evaclip` command: use models and their files without the pipeline that makes them.

Covers: listing architectures, classifying images against given labels, features of images and
captions, conversion of checkpoints, taking over a training.
Not here: training itself, evaluation sets, the registry.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evaclip_model.cpu.allocator import freed_memory_kept
from evaclip_model.errors import InputError
from evaclip_model.model.model_config import ALIASES, CONFIG_FILE, ModelConfig, list_models

# torch and what needs it are imported by the commands: it is slow, and neither the help nor most
# mistakes need it.
if TYPE_CHECKING:
    from torch import Tensor

    from evaclip_model.model.clip import EvaClip

MOST_NAMED = 10
"""Unreadable images named on the terminal; `embed` writes all of them to its file of names."""

_TOWER_FORMS = {"vision": "timm", "text": "transformers"}
"""Part of a model -> the form that holds this part alone."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 2 after a mistake of the user's."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except InputError as error:
        print(f"evaclip: {error}", file=sys.stderr)
        return 2
    return 0


def classify(
    image: Path, labels: Sequence[str], model_folder: Path, template: str = "{}"
) -> list[tuple[str, float]]:
    """Labels and their probabilities (sum 1), the most probable first.

    Args:
        image: a JPEG, PNG or WebP file.
        labels: at least two different captions or class names.
        model_folder: what `save_model` wrote.
        template: prompt around a label, with one `{}`.

    Raises:
        InputError: fewer than two labels, a missing or unreadable file, a wrong template.
    """
    _check_labels(labels, template)
    if not image.is_file():
        raise InputError(f"image {image} does not exist")

    from evaclip_model.create import open_model
    from evaclip_model.zeroshot.image_files import image_features

    model = open_model(model_folder)
    values = image_features(model, [image]).values
    shares = _shares(model, values, labels, template)[0].tolist()
    return sorted(zip(labels, shares, strict=True), key=lambda pair: -pair[1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaclip", description="Use EVA-CLIP models and their files."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("models", help="list the architectures that ship")
    command.set_defaults(run=_run_models)
    _add_classify(commands.add_parser("classify", help="say which label fits an image"))
    _add_embed(commands.add_parser("embed", help="write features of images or of captions"))
    _add_convert(commands.add_parser("convert", help="write a checkpoint in another form"))
    _add_take_over(commands.add_parser("take-over", help="go on with a DeepSpeed training"))
    return parser


def _add_classify(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_run_classify)
    command.add_argument("images", type=Path, metavar="IMAGE", help="an image, or a folder of them")
    command.add_argument("labels", nargs="+", metavar="LABEL", help="at least two captions")
    _add_model(command)
    command.add_argument(
        "--template", default="{}", help="prompt around each label (default: the label alone)"
    )


def _add_embed(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_run_embed)
    command.add_argument(
        "images", type=Path, nargs="*", metavar="IMAGE", help="images, or folders of them"
    )
    command.add_argument(
        "--text", type=Path, metavar="FILE", help="captions, one a line, instead of images"
    )
    _add_model(command)
    command.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="X.npy",
        help="unit vectors [N, E] in float32; X.json says what each row is of",
    )


def _add_convert(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_run_convert)
    command.add_argument(
        "source", type=Path, metavar="SOURCE", help="a checkpoint of any known layout"
    )
    command.add_argument(
        "dest", type=Path, metavar="DEST", help="a folder, or a .safetensors file of weights alone"
    )
    command.add_argument(
        "--as",
        dest="form",
        required=True,
        choices=("native", "open_clip", "timm", "transformers", "onnx"),
        help="whose names and files",
    )
    command.add_argument(
        "--model",
        metavar="NAME",
        help="its architecture: a name or a JSON file (a saved model's folder says it itself)",
    )
    command.add_argument(
        "--part",
        default="all",
        choices=("all", *_TOWER_FORMS),
        help="the tower that SOURCE holds, when it holds one alone",
    )
    command.add_argument(
        "--allow-torchscript",
        action="store_true",
        help="open OpenAI's archives, which hold code besides weights",
    )
    _add_precision(command)


def _add_take_over(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_run_take_over)
    command.add_argument(
        "source", type=Path, metavar="SOURCE", help="folder of a ZeRO-1, ZeRO-2 or universal one"
    )
    command.add_argument(
        "job", type=Path, metavar="TRAIN_JSON", help="the run to come, which then starts there"
    )


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model",
        required=True,
        metavar="DIR|NAME",
        help="a saved model's folder; or with --weights an architecture's name or JSON file",
    )
    command.add_argument(
        "--weights", type=Path, metavar="FILE", help="a checkpoint of any known layout"
    )
    command.add_argument("--device", default="cpu", help="such as cuda (default: cpu)")
    command.add_argument(
        "--batch-size", type=_positive, default=64, help="images or captions at once (default: 64)"
    )
    _add_precision(command)


def _add_precision(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--precision",
        default="fp32",
        choices=("fp32", "bf16", "fp16"),
        help="dtype of the weights (default: fp32)",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no number from 1 on")
    return int(text)


def _run_models(options: argparse.Namespace) -> None:
    import torch

    from evaclip_model.model.clip import EvaClip

    aliases = {name: alias for alias, name in ALIASES.items()}
    print(f"{'':<22}{'parameters':>14}{'image':>8}{'text':>7}{'px':>5}{'patch':>7}{'joint':>7}")
    for name in list_models():
        config = ModelConfig.load(name)
        with torch.device("meta"):  # counted without memory
            model = EvaClip(config)
        whole, image, text = (
            sum(value.numel() for value in part.parameters())
            for part in (model, model.visual, model.text)
        )
        print(
            f"{name:<22}{whole:>14,}{image / 1e6:>7,.0f}M{text / 1e6:>6,.0f}M"
            f"{config.vision.image_px:>5}{config.vision.patch_px:>7}{config.embed_dim:>7}"
            + (f"  = {aliases[name]}" if name in aliases else "")
        )


def _run_classify(options: argparse.Namespace) -> None:
    _check_labels(options.labels, options.template)

    from evaclip_model.zeroshot.image_files import image_features, image_files

    files = image_files(options.images)
    model = _open(options)
    found = image_features(
        model, files, batch_size=options.batch_size, progress=_Progress("images", len(files))
    )
    shares = _shares(model, found.values, options.labels, options.template)
    if files == [options.images]:
        for share, label in sorted(zip(shares[0].tolist(), options.labels, strict=True))[::-1]:
            print(f"{share:7.1%}  {label}")
    else:
        best, places = (values.tolist() for values in shares.max(dim=1))
        for file, share, place in zip(found.files, best, places, strict=True):
            print(f"{share:7.1%}  {options.labels[place]}  {file}")
    _warn_of_unreadable(found.unreadable, len(files))


def _run_embed(options: argparse.Namespace) -> None:
    if options.out.suffix != ".npy":
        raise InputError(f"--out {options.out}: features are written as .npy, end the name in it")
    if not options.out.absolute().parent.is_dir():
        raise InputError(f"--out {options.out}: the folder does not exist, make it first")
    if bool(options.images) == (options.text is not None):
        raise InputError("give images or folders of them, or --text FILE, and not both")
    with freed_memory_kept():
        if options.text is not None:
            _embed_texts(options)
        else:
            _embed_images(options)


def _embed_images(options: argparse.Namespace) -> None:
    from evaclip_model.zeroshot.image_files import (
        image_features,
        image_files,
        names_file,
        write_features,
    )

    files = list(dict.fromkeys(file for source in options.images for file in image_files(source)))
    model = _open(options)
    found = image_features(
        model, files, batch_size=options.batch_size, progress=_Progress("images", len(files))
    )
    about = {"unreadable": {str(file): why for file, why in found.unreadable.items()}}
    write_features(options.out, found.values, list(map(str, found.files)), about)
    _warn_of_unreadable(found.unreadable, len(files))
    print(f"{len(found.files):,} images: {options.out}, {names_file(options.out)}")


def _embed_texts(options: argparse.Namespace) -> None:
    try:
        texts = options.text.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{options.text} cannot be read as lines of text ({error})") from None
    if not texts:
        raise InputError(f"{options.text} is empty: expected one caption a line")

    from evaclip_model.zeroshot.exact_ranks import encode_texts
    from evaclip_model.zeroshot.image_files import names_file, write_features

    model = _open(options)
    values = encode_texts(
        model,
        texts,
        context_length=model.config.text.context_length,
        batch_size=options.batch_size,
        device=options.device,
        progress=_Progress("captions", len(set(texts))),
    )
    write_features(options.out, values, texts, {})
    print(f"{len(texts):,} captions: {options.out}, {names_file(options.out)}")


def _run_convert(options: argparse.Namespace) -> None:
    if options.part != "all" and options.form != _TOWER_FORMS[options.part]:
        raise InputError(
            f"--part {options.part}: a tower alone can be written as "
            f"{_TOWER_FORMS[options.part]}, but {options.form} would need the other one, too"
        )
    if options.model is None and not (options.source / CONFIG_FILE).is_file():
        raise InputError(
            f"{options.source} does not say its architecture: name it with --model "
            "(`evaclip models` lists them)"
        )

    from evaclip_model.create import create_model, load_model
    from evaclip_model.weights.export import export_model, export_onnx
    from evaclip_model.weights.load import load_weights

    architecture = options.source if options.model is None else options.model
    if options.part == "all":
        model, report = load_model(architecture, options.source, precision=options.precision)
    else:  # the other tower is there and is not written
        model = create_model(architecture, precision=options.precision, seed=0)
        report = load_weights(
            model, options.source, part=options.part, allow_torchscript=options.allow_torchscript
        )
    model.eval()
    print(f"{options.source}: {report}")
    if report.expected_gaps:
        gaps = ", ".join(report.expected_gaps[:2]) + ", …" * (len(report.expected_gaps) > 2)
        print(f"evaclip: not taken from the source, so at initial values: {gaps}", file=sys.stderr)
    if options.form == "onnx":
        written = export_onnx(model, options.dest)
    else:
        written = export_model(model, options.dest, options.form)
    for path in written:
        print(path)


def _run_take_over(options: argparse.Namespace) -> None:
    try:
        settings = json.loads(options.job.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{options.job} cannot be read as a training job ({error})") from None

    from evaclip_model.training.checkpoint.deepspeed_import import import_checkpoint
    from evaclip_model.training.config import CHECKPOINTS, TrainJob

    job = TrainJob.from_mapping(settings, where=str(options.job))
    location = job.checkpoints or job.run_dir / CHECKPOINTS
    architecture = ModelConfig.load(job.start_from)
    progress = import_checkpoint(options.source, location, job.train, architecture)
    print(f"{location}: step {progress.step:,} of {job.train.steps:,}")


def _open(options: argparse.Namespace) -> EvaClip:
    """The model that `_add_model`'s options name, in evaluation mode on its device."""
    import torch

    from evaclip_model.create import create_model, open_model

    if options.weights is not None:
        model = create_model(
            options.model, weights=options.weights, precision=options.precision
        ).eval()
    elif options.model in (*list_models(), *ALIASES) and not Path(options.model).exists():
        raise InputError(
            f"--model {options.model} is an architecture: add --weights FILE, or give the folder "
            "of a saved model"
        )
    else:
        model = open_model(options.model, options.precision)
    try:
        return model.to(torch.device(options.device))
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        first = str(error).splitlines()[0]
        raise InputError(f"--device {options.device} cannot be used here ({first})") from None


def _check_labels(labels: Sequence[str], template: str) -> None:
    if len(set(labels)) < 2:
        raise InputError("give at least two different labels to choose from")
    if template.count("{}") != 1:
        raise InputError(f"template '{template}' must hold '{{}}' once, where the label goes")


def _shares(model: EvaClip, images: Tensor, labels: Sequence[str], template: str) -> Tensor:
    """Probabilities [N, L] of labels for image features [N, E]."""
    from evaclip_model.zeroshot.exact_ranks import encode_texts

    texts = encode_texts(
        model,
        [template.replace("{}", label) for label in labels],
        context_length=model.config.text.context_length,
        device=str(model.logit_scale.device),
    )
    scale = model.logit_scale.detach().float().exp().cpu()
    return (scale * images @ texts.T).softmax(dim=-1)


def _warn_of_unreadable(unreadable: Mapping[Path, str], total: int) -> None:
    if unreadable:
        print(f"{len(unreadable):,} of {total:,} images cannot be read:", file=sys.stderr)
    for file, why in list(unreadable.items())[:MOST_NAMED]:
        print(f"  {file} ({why})", file=sys.stderr)
    if len(unreadable) > MOST_NAMED:
        print(f"  and {len(unreadable) - MOST_NAMED:,} more", file=sys.stderr)


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
        line = f"{done:,} of {self._total:,} {self._what}, {rate:,.1f} a second"
        end = "\n" if is_end or not self._in_place else ""
        start = "\r\033[K" if self._in_place else ""
        print(start + line, end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
