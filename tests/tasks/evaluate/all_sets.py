"""All sets of the paper's tables in their published layout, with small made-up content.

Covers: real numbers of classes and templates, real ImageNet names, several tars, all image formats
and modes, captions of all kinds; a few dozen images a set.
Not here: real images, so no figure means anything.

webdataset's own writer makes the tars, as it made the published ones: nothing of this project's.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from webdataset import TarWriter

from evaclip_model.zeroshot.imagenet_prompts import imagenet_classnames, imagenet_templates
from tasks.evaluate.sets.prompts import subset_classes
from tasks.evaluate.sets.set_registry import KnownSet, all_sets, known_sets

IMAGES = 48
"""Images a set, unless told otherwise."""
TARS = {"mnist": 2, "cifar100": 4, "imagenet-a": 4, "food101": 5, "flickr30k": 5, "coco": 5}
"""Tars of published sets; the others here have three."""
FORMATS = ("webp", "png", "jpg", "jpeg")

_KINDS = (
    *("small", "large", "old", "new", "plain", "spotted", "striped", "wooden", "metal", "paper"),
    *("red", "green", "blue", "grey"),
)
_THINGS = (
    *("lamp", "chair", "bird", "fish", "boat", "tree", "cup", "box", "house", "bridge", "car"),
    *("flower", "shirt", "clock", "plate", "road", "leaf", "stone", "wheel", "bottle", "table"),
    *("door", "window", "book", "coin", "shell", "rope", "drum", "kite", "mask", "glove", "boot"),
    *("hat", "bag", "comb", "key", "spoon", "bowl", "basket", "candle", "mirror", "pillow"),
    *("ladder", "hammer", "saw", "brush", "bell", "flag", "tent", "map", "stamp"),
)
_FORMS = ("a photo of {}", "a picture of {}", "a drawing of {}", "a close view of {}")
_DETAILS = ("", " outdoors", " indoors", " at night", " in colour")


def write_all_sets(
    root: Path, keys: Sequence[str] | None = None, images: int = IMAGES, seed: int = 0
) -> dict[str, Path]:
    """Write the sets of these keys (all 33) below `root`; key -> folder, by its published name."""
    known = all_sets()
    return {
        key: write_known_set(root / known[key].wds, known[key], images, seed)
        for key in keys or known_sets()
    }


def write_known_set(folder: Path, known: KnownSet, images: int = IMAGES, seed: int = 0) -> Path:
    """One set with the classes of a known one, and a few images that mean nothing."""
    draw = random.Random(f"{known.key} {seed}")
    tars = TARS.get(known.key, 3)
    (folder / "test").mkdir(parents=True)
    if known.kind != "classification":
        (folder / "dataset_type.txt").write_text(f"{known.kind}\n")
    if known.classes:
        names = class_names(known)
        (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in names))
        if known.prompts[0] == "dataset":
            lines = "".join(f"{template}\n" for template in templates(known))
            (folder / "zeroshot_classification_templates.txt").write_text(lines)
    count = min(images, known.n or images)
    answers = list(_answers(known, count, draw))
    for number in range(tars):
        with TarWriter(str(folder / "test" / f"{number}.tar")) as tar:
            for index in range(number * count // tars, (number + 1) * count // tars):
                form = FORMATS[index % len(FORMATS)]
                picture = _picture(draw, border=known.key == "objectnet")
                key = f"s{index:07d}"
                tar.write({"__key__": key, form: _encoded(picture, form, index), **answers[index]})
    (folder / "test" / "nshards.txt").write_text(f"{tars}\n")
    return folder


def class_names(known: KnownSet) -> list[str]:
    """As many names as the set has classes: ImageNet's own, or made-up ones."""
    names = imagenet_classnames()
    if known.subset_of:
        return [names[index] for index in subset_classes(known)]
    if known.classes == len(names):
        return list(names)
    made_up = [f"{kind} {thing}" for kind, thing in product(_KINDS, _THINGS)]
    return made_up[: known.classes]


def templates(known: KnownSet) -> list[str]:
    """As many templates as the published set has: ImageNet's own, or made-up ones."""
    if known.templates == len(imagenet_templates()):
        return list(imagenet_templates())
    forms = product(("a {c}", "the {c}", "one {c}"), _FORMS, _DETAILS)
    made_up = [f"{form.format(which)}{detail}." for which, form, detail in forms]
    return made_up[: known.templates]


def _answers(known: KnownSet, count: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    if known.kind == "retrieval":
        for index in range(count):
            yield {"txt": "\n".join(_captions(index, draw))}
        return
    assert known.classes
    for index in range(count):
        label = index * known.classes // count  # spread over all classes
        if known.kind == "multilabel":
            vector = np.zeros(known.classes, np.int64)
            vector[draw.sample(range(known.classes), draw.randint(1, 3))] = 1
            yield {"npy": vector}
        else:
            yield {"cls": label}


def _captions(index: int, draw: random.Random) -> list[str]:
    """Five captions, six of every tenth image; some that another image has too, or of two lines."""
    count = 6 if index % 10 == 9 else 5
    things = [f"{draw.choice(_KINDS)} {draw.choice(_THINGS)}" for _ in range(count)]
    captions = [f"a {one} beside a {two}" for one, two in pairwise([*things, things[0]])]
    if index % 8 < 2:
        captions[0] = f"the same words for images {index // 8 * 8} and the next"
    if index % 7 == 3:
        captions[1] = rf"{captions[1]}\nand something below it"
    return captions


def _picture(draw: random.Random, border: bool) -> Image.Image:
    size = (draw.randint(24, 64), draw.randint(24, 64))
    colours = [tuple(draw.randrange(256) for _ in range(3)) for _ in range(3)]
    image = Image.new("RGB", size, colours[0])
    pen = ImageDraw.Draw(image)
    for colour in colours[1:]:
        left, top = draw.randrange(size[0] // 2), draw.randrange(size[1] // 2)
        pen.ellipse((left, top, left + size[0] // 2, top + size[1] // 2), fill=colour)
    if border:
        pen.rectangle((0, 0, size[0] - 1, size[1] - 1), outline=(255, 0, 0))
    return image


def _encoded(image: Image.Image, form: str, index: int) -> bytes:
    """The image as a file, now and then grey, with a palette, or with transparency."""
    out = io.BytesIO()
    if form == "webp":
        image.save(out, "WEBP", lossless=True)
    elif form == "png":
        image.convert(("RGB", "L", "P", "RGBA")[index // len(FORMATS) % 4]).save(out, "PNG")
    else:
        image.convert("L" if index % 16 == 2 else "RGB").save(out, "JPEG", quality=90)
    return out.getvalue()
