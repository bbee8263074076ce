"""The `evaclip` command: use a saved model without the pipeline that made it.

Covers: classifying an image against given labels; listing the shipped architectures.
Not here: training, evaluation sets, the registry.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evaclip_model.errors import InputError
from evaclip_model.model_config import ModelConfig, list_models


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 2 after a mistake of the user's."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "models":
            _print_models()
        else:
            _print_classes(options.image, options.labels, options.model, options.template)
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
    if len(set(labels)) < 2:
        raise InputError("give at least two different labels to choose from")
    if template.count("{}") != 1:
        raise InputError(f"template '{template}' must hold '{{}}' once, where the label goes")
    if not image.is_file():
        raise InputError(f"image {image} does not exist")

    import torch  # slow to import, and not needed to report the mistakes above

    from evaclip_model.create import open_model
    from evaclip_model.tokenizer import tokenize
    from evaclip_model.transform import UnreadableImageError, decode_image, image_transform

    model = open_model(model_folder)
    try:
        pixels = image_transform(model)(decode_image(image.read_bytes()))
    except UnreadableImageError as error:
        raise InputError(f"image {image} cannot be decoded ({error})") from None
    tokens = tokenize(
        [template.replace("{}", label) for label in labels], model.config.text.context_length
    )
    with torch.inference_mode():
        image_features, text_features, scale = model(pixels[None], tokens)
        shares = (scale * image_features @ text_features.T).softmax(dim=-1)[0].tolist()
    return sorted(zip(labels, shares, strict=True), key=lambda pair: -pair[1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="evaclip", description="Use an EVA-CLIP model.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("classify", help="say which label fits an image")
    command.add_argument("image", type=Path, metavar="IMAGE", help="a JPEG, PNG or WebP file")
    command.add_argument("labels", nargs="+", metavar="LABEL", help="at least two captions")
    command.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder with config.json and model.safetensors",
    )
    command.add_argument(
        "--template", default="{}", help="prompt around each label (default: the label alone)"
    )
    commands.add_parser("models", help="list the architectures that ship with the package")
    return parser


def _print_classes(image: Path, labels: Sequence[str], model: Path, template: str) -> None:
    for label, share in classify(image, labels, model, template):
        print(f"{share:7.1%}  {label}")


def _print_models() -> None:
    names = list_models()
    wide = max(map(len, names))
    for name in names:
        config = ModelConfig.load(name)
        vision, text = config.vision, config.text
        print(
            f"{name:<{wide}}  {vision.image_px:>3} px, patch {vision.patch_px:>2}; "
            f"image tower {vision.layers} x {vision.width}; "
            f"text tower {text.layers} x {text.width}; joint space {config.embed_dim}"
        )


if __name__ == "__main__":
    raise SystemExit(main())
