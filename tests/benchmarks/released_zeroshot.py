"""Zero-shot ImageNet accuracy of the released files, beside Table 1 of the paper.

    python tests/benchmarks/released_zeroshot.py --files DIR --imagenet VAL [--device cuda]
    python tests/benchmarks/released_zeroshot.py --rehearse [ARCHITECTURE]

DIR holds any of the files below under the names they were released with (Hugging Face, model
QuanSun/EVA-CLIP). VAL holds the validation images in one folder a class, 1000 folders whose sorted
names are in the order of the class ids, as the dataset comes. Each model is loaded strictly, its
class vectors are made from OpenAI's 80 prompts, and a row of Markdown is printed as soon as it is
measured.

`--rehearse` does all of that on random weights in the released layout (half precision, a .pt file)
and eight small images a class for a few classes; its accuracy is that of chance.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from evaclip_model.create import create_model
from evaclip_model.zeroshot.encode_chunks import (
    EvaSubject,
    embed_texts,
    image_features,
    image_files,
)
from evaclip_model.zeroshot.exact_ranks import build_classifier, fill_templates, rank_classes
from evaclip_model.zeroshot.imagenet_prompts import imagenet_classnames, imagenet_templates
from evaclip_model.zeroshot.statistics import count_hits, wilson_interval


@dataclass(frozen=True)
class Released:
    """One file, and what Table 1 says of it."""

    file: str
    architecture: str
    top1: float | None
    """Zero-shot top-1 on ImageNet, in percent, as printed."""


RELEASED = (
    Released("EVA01_CLIP_g_14_psz14_s11B.pt", "EVA01-CLIP-g-14", 78.5),
    Released("EVA01_CLIP_g_14_plus_psz14_s11B.pt", "EVA01-CLIP-g-14-plus", 79.3),
    Released("EVA02_CLIP_B_psz16_s8B.pt", "EVA02-CLIP-B-16", 74.7),
    Released("EVA02_CLIP_L_psz14_s4B.pt", "EVA02-CLIP-L-14", 79.8),
    Released("EVA02_CLIP_L_336_psz14_s6B.pt", "EVA02-CLIP-L-14-336", 80.4),
    Released("EVA02_CLIP_E_psz14_s4B.pt", "EVA02-CLIP-E-14", 81.9),
    Released("EVA02_CLIP_E_psz14_plus_s9B.pt", "EVA02-CLIP-E-14-plus", 82.0),
)
REHEARSED_CLASSES = 20
PROGRESS_EVERY_S = 30


def main() -> None:
    """Measure every released file that is there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=Path, help="folder of the released files")
    parser.add_argument("--imagenet", type=Path, help="validation images, a folder a class")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--rehearse",
        nargs="?",
        const="EVA02-CLIP-demo",
        metavar="ARCHITECTURE",
        help="on random weights and images (default: the demo's small one)",
    )
    options = parser.parse_args()
    if not options.rehearse and not (options.files and options.imagenet):
        parser.error("give --files and --imagenet, or --rehearse")
    if options.rehearse:
        with tempfile.TemporaryDirectory() as folder:
            rehearse(Path(folder), options)
        return
    there = [one for one in RELEASED if (options.files / one.file).is_file()]
    if not there:
        names = ", ".join(one.file for one in RELEASED)
        parser.error(f"{options.files} has none of {names}")
    classes = class_folders(options.imagenet, len(imagenet_classnames()))
    print_head()
    for one in there:
        measure(one, options.files / one.file, classes, options)


def print_head() -> None:
    print("| architecture | images | top-1 | 95 % interval | Table 1 | unreadable | minutes |")
    print("|---|---|---|---|---|---|---|", flush=True)


def measure(
    one: Released, file: Path, classes: Sequence[Path], options: argparse.Namespace
) -> None:
    """Print one model's row; class i is the i-th of `classes` and of ImageNet's names."""
    start = time.monotonic()
    model = create_model(one.architecture, weights=file, precision=options.precision)
    model = model.to(options.device).eval()
    names = imagenet_classnames()[: len(classes)]
    asked = fill_templates(names, imagenet_templates())
    vectors = build_classifier(embed_texts(EvaSubject(model), asked), names)
    label_of = {path: place for place, folder in enumerate(classes) for path in image_files(folder)}
    told = say(one, len(label_of))
    read, features, unreadable = image_features(model, list(label_of), options.batch_size, told)
    labels = torch.tensor([label_of[path] for path in read])
    right = count_hits(rank_classes(features, vectors, labels).ranks, 1)
    low, high = wilson_interval(right, len(labels))
    said = "none" if one.top1 is None else f"{one.top1:.1f}%"
    print(
        f"| {one.architecture} | {len(labels):,} | {right / len(labels):.1%} "
        f"| {low:.1%} to {high:.1%} | {said} | {len(unreadable)} "
        f"| {(time.monotonic() - start) / 60:.1f} |",
        flush=True,
    )


def class_folders(folder: Path, count: int) -> list[Path]:
    """Sorted folders of the classes; stops when there are not `count`."""
    found = sorted(path for path in folder.iterdir() if path.is_dir())
    if len(found) != count:
        sys.exit(f"{folder} has {len(found)} folders: expected one a class, {count} in all")
    return found


def say(one: Released, total: int) -> Callable[[int], None]:
    """Progress on stderr, twice a minute."""
    said = time.monotonic()

    def progress(done: int) -> None:
        nonlocal said
        if time.monotonic() - said > PROGRESS_EVERY_S:
            said = time.monotonic()
            print(f"{one.architecture}: {done:,} of {total:,} images", file=sys.stderr)

    return progress


def rehearse(folder: Path, options: argparse.Namespace) -> None:
    """The same on a file as it was released, but of random weights, and on random images."""
    one = Released("rehearsal.pt", options.rehearse, None)
    model = create_model(one.architecture, precision="fp16", seed=0)
    state = model.state_dict()
    state["logit_scale"] = state["logit_scale"].reshape(())
    torch.save(state, folder / one.file)
    draw = random.Random(0)
    for place in range(REHEARSED_CLASSES):
        of_class = folder / "val" / f"n{place:08d}"
        of_class.mkdir(parents=True)
        for number in range(8):
            colour = tuple(draw.randrange(256) for _ in range(3))
            Image.new("RGB", (70, 50 + number), colour).save(of_class / f"{number}.jpeg")
    classes = class_folders(folder / "val", REHEARSED_CLASSES)
    print_head()
    measure(one, folder / one.file, classes, options)


if __name__ == "__main__":
    main()
