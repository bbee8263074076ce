"""PASCAL VOC's test images as evaluation sets: its boxes cut out, or whole images with all classes.

The paper's column VOC2007 is the boxes, "difficult" ones too: 14,976 of one class each.
"""

from collections.abc import Mapping, Sequence
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


def voc_classes(root: Path) -> tuple[str, ...]:
    """The classes of the VOC folder `root` (VOCdevkit/VOC2007), as its lists are called. Raises
    InputError: it has no lists of its test images."""
    lists = (root / "ImageSets" / "Main").glob("*_test.txt")
    names = sorted(path.name.removesuffix("_test.txt") for path in lists)
    if not names:
        raise InputError(
            f"{root} has no ImageSets/Main/*_test.txt: expected a folder VOCdevkit/VOC2007 with "
            "images, annotations and lists"
        )
    return tuple(names)


def voc_sources(root: Path, labels: Sequence[int], whole: bool = False) -> list[Source]:
    """Every annotated box of the test images, image by image; or whole images with all labels.

    Args:
        labels: label of each of VOC's classes, in their order.

    Raises InputError: a list or an annotation is missing or of another form.
    """
    label_of = dict(zip(voc_classes(root), labels, strict=True))
    listing = root / "ImageSets" / "Main" / "test.txt"
    try:
        images = listing.read_text().split()
    except FileNotFoundError:
        raise InputError(f"{listing} is missing: expected the names of the images") from None
    found = []
    for image in images:
        path = path_inside(root / "JPEGImages", f"{image}.jpg", "VOC's list of images")
        stamp, boxes = stamp_of(path), _list_boxes(root, image, label_of)
        if not whole:
            found += [
                Source(f"{image}[{n}]", partial(_cut_box, path, box, label), f"{stamp} {box}")
                for n, (label, box) in enumerate(boxes)
            ]
        else:
            answer = sorted({label for label, _ in boxes})
            found.append(Source(image, partial(_read_whole, path, answer), stamp))
    return found


def _list_boxes(root: Path, image: str, label_of: Mapping[str, int]) -> list[tuple[int, Box]]:
    path = root / "Annotations" / f"{image}.xml"
    try:
        found = [_parse_box(entry) for entry in ElementTree.parse(path).iterfind("object")]
    except FileNotFoundError:
        raise InputError(f"{path} is missing: expected the boxes of this image") from None
    except (ElementTree.ParseError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not an annotation of VOC's form ({error})") from None
    for label, _ in found:
        if label not in label_of:
            raise InputError(f"{path}: class '{label}' is not one of {', '.join(label_of)}")
    return [(label_of[label], box) for label, box in found]


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
