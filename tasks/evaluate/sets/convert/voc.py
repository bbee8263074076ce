"""PASCAL VOC's test images as evaluation sets: its boxes cut out, or whole images with all classes.

The paper's column VOC2007 is the boxes, "difficult" ones too: 14,976 of one class each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from evaclip_model.errors import InputError
from evaclip_model.reading.image_decoder import UnreadableImageError, decode_image
from tasks.evaluate.sets.convert.shard_writer import (
    Found,
    Source,
    UnusableSourceError,
    encode_png,
    image_file,
)
from tasks.evaluate.sets.convert.source_images import path_inside, stamp_of

Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels."""
_EDGES = ("xmin", "ymin", "xmax", "ymax")


def voc_classes(root: Path, split: str = "test") -> tuple[str, ...]:
    """The classes of the VOC folder `root` (VOCdevkit/VOC2007), as its lists are called.

    Raises:
        InputError: it has no lists of this split.
    """
    lists = (root / "ImageSets" / "Main").glob(f"*_{split}.txt")
    names = sorted(path.name.removesuffix(f"_{split}.txt") for path in lists)
    if not names:
        raise InputError(
            f"{root} has no ImageSets/Main/*_{split}.txt: expected a folder VOCdevkit/VOC2007 with "
            "images, annotations and lists"
        )
    return tuple(names)


def box_sources(root: Path, labels: Sequence[int], split: str = "test") -> list[Source]:
    """Every annotated box of the split, image by image.

    Args:
        labels: label of each of VOC's classes, in their order.

    Raises:
        InputError: a list or an annotation is missing or of another form.
    """
    classes = voc_classes(root, split)
    return [
        Source(
            f"{image}[{number}]",
            partial(_cut_box, _image_path(root, image), box, labels[classes.index(label)]),
            f"{stamp_of(_image_path(root, image))} {box}",
        )
        for image in _list_images(root, split)
        for number, (label, box) in enumerate(_list_boxes(root, image, classes))
    ]


def image_sources(
    root: Path, labels: Sequence[int], count: int, split: str = "test"
) -> list[Source]:
    """Every image of the split with 0 or 1 for each of `count` classes.

    Args:
        labels: label of each of VOC's classes, in their order.

    Raises:
        InputError: a list or an annotation is missing or of another form.
    """
    classes = voc_classes(root, split)
    found = []
    for image in _list_images(root, split):
        there = {labels[classes.index(label)] for label, _ in _list_boxes(root, image, classes)}
        answer = [int(label in there) for label in range(count)]
        path = _image_path(root, image)
        found.append(Source(image, partial(_read_whole, path, answer), stamp_of(path)))
    return found


def _list_images(root: Path, split: str) -> list[str]:
    path = root / "ImageSets" / "Main" / f"{split}.txt"
    try:
        return path.read_text().split()
    except FileNotFoundError:
        raise InputError(f"{path} is missing: expected the names of the images") from None


def _image_path(root: Path, name: str) -> Path:
    return path_inside(root / "JPEGImages", f"{name}.jpg", "VOC's list of images")


def _list_boxes(root: Path, image: str, classes: Sequence[str]) -> list[tuple[str, Box]]:
    path = root / "Annotations" / f"{image}.xml"
    try:
        found = [_parse_box(entry) for entry in ElementTree.parse(path).iterfind("object")]
    except FileNotFoundError:
        raise InputError(f"{path} is missing: expected the boxes of this image") from None
    except (ElementTree.ParseError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not an annotation of VOC's form ({error})") from None
    for label, _ in found:
        if label not in classes:
            raise InputError(f"{path}: class '{label}' is not one of {', '.join(classes)}")
    return found


def _parse_box(entry: ElementTree.Element) -> tuple[str, Box]:
    left, top, right, bottom = (int(entry.findtext(f"bndbox/{edge}", "")) for edge in _EDGES)
    return entry.findtext("name", ""), (left, top, right, bottom)


def _cut_box(path: Path, box: Box, label: int) -> Found:
    try:
        image = decode_image(path.read_bytes())
    except UnreadableImageError as error:
        raise UnusableSourceError(f"is not an image: {error}") from None
    left, top, right, bottom = box
    if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
        raise UnusableSourceError(f"its box {box} is not inside the image")
    return Found(encode_png(image.convert("RGB").crop(box)), "png", label)


def _read_whole(path: Path, answer: Sequence[int]) -> Found:
    extension, content = image_file(path.read_bytes())
    return Found(content, extension, answer)
