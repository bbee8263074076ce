"""PASCAL VOC's test images as evaluation sets: its boxes cut out, or whole images with all classes.

The paper's column VOC2007 is the boxes, "difficult" ones too: 14,976 of one class each.
"""

from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from evaclip_model.errors import InputError
from evaclip_model.reading.image_decoder import UnreadableImageError, decode_image
from evaclip_model.reading.urls import read_text
from tasks.evaluate.sets.convert.label_table import LabelTable
from tasks.evaluate.sets.convert.shard_writer import Found, Source, UnusableSourceError, encode_png
from tasks.evaluate.sets.convert.source_images import image_source, path_inside, stamp_of

Box = tuple[int, ...]
"""Left, top, right and bottom in pixels."""
_EDGES = ("xmin", "ymin", "xmax", "ymax")


def read_voc(root: Path, whole: bool = False) -> LabelTable:
    """Every annotated box of the test images of the VOC folder `root` (VOCdevkit/VOC2007), image
    by image; or whole images with all their classes. Raises InputError: a list or an annotation is
    missing or of another form."""
    lists = (root / "ImageSets" / "Main").glob("*_test.txt")
    classes = sorted(path.name.removesuffix("_test.txt") for path in lists)
    if not classes:
        raise InputError(
            f"{root} has no ImageSets/Main/*_test.txt: expected a folder VOCdevkit/VOC2007 with "
            "images, annotations and lists"
        )
    listing = root / "ImageSets" / "Main" / "test.txt"
    try:
        images = read_text(listing).split()
    except FileNotFoundError:
        raise InputError(f"{listing} is missing: expected the names of the images") from None
    found = []
    for image in images:
        path = path_inside(root / "JPEGImages", f"{image}.jpg", "VOC's list of images")
        boxes = _list_boxes(root / "Annotations" / f"{image}.xml", classes)
        if whole:
            found.append(image_source(path, tuple({word for word, _ in boxes})))
            continue
        for n, (word, box) in enumerate(boxes):
            stamp = f"{stamp_of(path)} {box}"
            found.append(Source(f"{image}[{n}]", partial(_cut_box, path, box), stamp, (word,)))
    return LabelTable(found, classes, several=whole)


def _list_boxes(path: Path, classes: list[str]) -> list[tuple[str, Box]]:
    try:
        found = [
            (
                entry.findtext("name", ""),
                tuple(int(entry.findtext(f"bndbox/{edge}", "")) for edge in _EDGES),
            )
            for entry in ElementTree.parse(path).iterfind("object")
        ]
    except FileNotFoundError:
        raise InputError(f"{path} is missing: expected the boxes of this image") from None
    except (ElementTree.ParseError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not an annotation of VOC's form ({error})") from None
    for word, _ in found:
        if word not in classes:
            raise InputError(f"{path}: class '{word}' is not one of {', '.join(classes)}")
    return found


def _cut_box(path: Path, box: Box) -> Found:
    try:
        image = decode_image(path.read_bytes())
    except UnreadableImageError as error:
        raise UnusableSourceError(f"is not an image: {error}") from None
    left, top, right, bottom = box
    if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
        raise UnusableSourceError(f"its box {box} is not inside the image")
    return Found(encode_png(image.convert("RGB").crop((left, top, right, bottom))), "png")
