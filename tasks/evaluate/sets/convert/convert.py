"""Converters of images, videos, tables or a data set object into an evaluation set.

The paper's column VOC2007 is the boxes, "difficult" ones too: 14,976 of one class each.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from PIL import Image

from evaclip_model.errors import InputError
from evaclip_model.reading.image_decoder import UnreadableImageError, decode_image
from evaclip_model.reading.urls import read_text
from evaclip_model.zeroshot.imagenet_prompts import imagenet_classnames
from evaclip_model.zeroshot.set_layout import is_system_file
from tasks.encoders.open_models import explain_import, import_torchvision
from tasks.evaluate.sets.choice_questions import Question
from tasks.evaluate.sets.class_order import ClassOrder, Words, order_classes
from tasks.evaluate.sets.convert import shard_writer as tars, source_images as source
from tasks.evaluate.sets.convert.caption_sets import captioned_sources, choice_sources
from tasks.evaluate.sets.convert.label_table import LabelTable, read_label_table
from tasks.evaluate.sets.convert.videos import find_videos
from tasks.evaluate.sets.prompts import find_classnames
from tasks.evaluate.sets.set_registry import Kind, KnownSet, TorchvisionSet, all_sets, find_set
from tasks.progress import Report, report_nothing

OBJECTNET, OBJECTNET_1000 = "objectnet", "objectnet-1000"


def convert_imagefolder(
    root: Path, folder: Path, words: Words, report: Report = report_nothing
) -> tars.Conversion:
    """A folder of one folder of images a class; of ObjectNet, those that ImageNet has too, with
    their own names or with the labels of ImageNet's thousand that each of them stands for."""
    key = words.known.key if words.known else ""
    several, is_objectnet = key == OBJECTNET_1000, key in (OBJECTNET, OBJECTNET_1000)
    words_of = (
        source.objectnet_classes(root, several) if is_objectnet else source.class_folders(root)
    )
    images = list[tars.Source]()
    for at, said in words_of.items():
        images += [source.image_source(one, said) for one in source.walk_files(at)]
    if not images:
        raise InputError(f"{root} has no file in its folders")
    table, classes = LabelTable(images, [said[0] for said in words_of.values()], several), None
    if several:
        names = imagenet_classnames()
        classes = ClassOrder(names, {str(label): label for label in range(len(names))})
    elif is_objectnet:  # its names are its own, not those of a known list
        classes = order_classes(table.words, replace(words, known=None), where=str(root))
    origin = (key if several else "imagefolder", root)
    made = _write_table(folder, table, origin, words, report, classes, by_class=True)
    loose = [one for one in root.iterdir() if one.is_file() and not is_system_file(one.name)]
    if is_objectnet or not loose:
        return made
    remark = f"{len(loose)} files beside the class folders of {root} were left out"
    return replace(made, about_names=(*made.about_names, remark))


def convert_table(
    listing: Path,
    images: Path,
    folder: Path,
    words: Words,
    columns: tuple[str, str] = ("", ""),
    several: bool = False,
    split: str = "",
    report: Report = report_nothing,
) -> tars.Conversion:
    """Images that a table names with their labels (`read_label_table`)."""
    table = read_label_table(listing, images, columns, several, split)
    return _write_table(folder, table, ("table", listing, images), words, report, listing=listing)


def convert_torchvision(
    known: KnownSet,
    root: Path,
    folder: Path,
    words: Words,
    download: bool = False,
    split: str = "",
    report: Report = report_nothing,
) -> tars.Conversion:
    """A set of torchvision's in `root`; `split` is another than the one evaluated."""
    dataset, entry = open_torchvision(known, root, download, split), torchvision_set(known)
    names, relabel = torchvision_names(known, dataset), entry.relabel
    classes = ClassOrder(names, {name: label for label, name in enumerate(names)})
    if words.classnames:
        # The data set object's own words for its classes, in its order; else the usual names.
        own = [str(one) for one in getattr(dataset, "classes", ())]
        own = own if len(own) == len(names) == len(set(own)) else list(names)
        where = f"torchvision's {entry.dataset}"
        classes = order_classes(own, replace(words, known=known), where=where)
        # The list's labels, in the order of torchvision's own.
        relabel = tuple(classes.labels[own[label]] for label in relabel or range(len(own)))
    sources = dataset_sources(dataset, relabel, stamp=_stamp_of_files(root))
    origin = (known.key, root, split) if split else (known.key, root)
    return _write_set(folder, sources, origin, report, classes=classes, words=words)


def convert_videos(
    root: Path,
    folder: Path,
    words: Words,
    listing: Path | None = None,
    report: Report = report_nothing,
) -> tars.Conversion:
    """The centre frames of the videos below `root`, by their folders or a list."""
    table = find_videos(root, listing)
    origin = ("videos", root, listing or "")
    return _write_table(folder, table, origin, words, report, listing=listing)


def convert_voc(
    root: Path, folder: Path, words: Words, whole: bool = False, report: Report = report_nothing
) -> tars.Conversion:
    table = read_voc(root, whole)
    classes = order_classes(table.words, words, where=str(root))
    words = replace(words, known=find_set("voc2007-multilabel" if whole else "voc2007"))
    origin = ("voc multilabel" if whole else "voc classification", root)
    return _write_table(folder, table, origin, words, report, classes)


def convert_captions(
    listing: Path, images: Path, folder: Path, split: str = "test", report: Report = report_nothing
) -> tars.Conversion:
    sources = captioned_sources(listing, images, split)
    origin = ("captions", listing, images, split)
    return _write_set(folder, sources, origin, report, kind="retrieval", listing=listing)


def convert_choice(
    listing: Path, images: Path, folder: Path, report: Report = report_nothing
) -> tars.Conversion:
    sources, questions = choice_sources(listing, images)
    origin = ("choice", listing, images)
    return _write_set(folder, sources, origin, report, kind="choice", questions=questions)


def _write_table(
    folder: Path,
    table: LabelTable,
    origin: tuple[str | Path, ...],
    words: Words,
    report: Report,
    classes: ClassOrder | None = None,
    *,
    listing: Path | None = None,
    by_class: bool = False,
) -> tars.Conversion:
    """The set of a table from `origin`, (form, path, ...), in its order or class by class."""
    where, names = str(origin[1]), table.display_names
    classes = classes or order_classes(table.words, words, where=where, display_names=names)
    sources = []
    for one in table.images:
        labels = sorted(classes.labels[word] for word in one.answer)
        sources.append(replace(one, answer=labels if table.several else next(iter(labels), ())))
    if by_class:
        sources.sort(key=lambda one: one.answer)
    kind: Kind = "multilabel" if table.several else "classification"
    return _write_set(
        *(folder, sources, origin, report), kind=kind, classes=classes, words=words, listing=listing
    )


def _write_set(
    folder: Path,
    sources: Sequence[tars.Source],
    origin: Sequence[str | Path],
    report: Report,
    *,
    kind: Kind = "classification",
    classes: ClassOrder | None = None,
    words: Words | None = None,
    listing: Path | None = None,
    questions: Sequence[Question] = (),
) -> tars.Conversion:
    places = [str(one.absolute() if isinstance(one, Path) else one) for one in origin]
    plan = {"origin": places, "sources": _digest_lines(f"{s.name}\t{s.stamp}" for s in sources)}
    if classes is not None:
        plan["labels"] = _digest_lines([repr(sorted(classes.labels.items()))])
    if listing is not None and listing.is_dir():
        plan["listing"] = _stamp_of_files(listing)
    elif listing is not None:
        plan["listing"] = hashlib.sha256(listing.read_bytes()).hexdigest()
    made = tars.write_set(
        *(folder, sources),
        kind=kind,
        plan=plan,
        classnames=classes.names if classes else (),
        templates=words.set_templates() if words else (),
        questions=questions,
        report=report,
    )
    return replace(made, about_names=classes.remarks if classes else ())


def _digest_lines(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _stamp_of_files(root: Path) -> str:
    """16 hex digits over all files below `root`, by size and time of change."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return _digest_lines(f"{path}\t{source.stamp_of(path)}" for path in files)


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
        path = source.path_inside(root / "JPEGImages", f"{image}.jpg", "VOC's list of images")
        boxes = _list_boxes(root / "Annotations" / f"{image}.xml", classes)
        if whole:
            found.append(source.image_source(path, tuple({word for word, _ in boxes})))
            continue
        for n, (word, box) in enumerate(boxes):
            stamp = f"{source.stamp_of(path)} {box}"
            found.append(tars.Source(f"{image}[{n}]", partial(_cut_box, path, box), stamp, (word,)))
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


def _cut_box(path: Path, box: Box) -> tars.Found:
    try:
        image = decode_image(path.read_bytes())
    except UnreadableImageError as error:
        raise tars.UnusableSourceError(f"is not an image: {error}") from None
    left, top, right, bottom = box
    if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
        raise tars.UnusableSourceError(f"its box {box} is not inside the image")
    return tars.Found(tars.encode_png(image.convert("RGB").crop((left, top, right, bottom))), "png")


MapDataset = Sequence[tuple[Any, Any]]
"""A torchvision data set: `dataset[i]` is (image, label), the image of Pillow or a file."""


def torchvision_set(known: KnownSet) -> TorchvisionSet:
    """The registry's entry of torchvision's set. Raises InputError: torchvision has none."""
    if known.torchvision is None:
        there = ", ".join(key for key, one in all_sets().items() if one.torchvision)
        raise InputError(f"torchvision has no set '{known.key}'; it has {there}")
    return known.torchvision


def open_torchvision(
    known: KnownSet, root: Path, download: bool = False, split: str = ""
) -> MapDataset:
    """torchvision's data set of a known set, in `root`; of a `split` that is not the one evaluated,
    by torchvision's name. Raises InputError: torchvision has none, cannot be imported, has no such
    split, or does not find its files."""
    entry = torchvision_set(known)
    with explain_import("torchvision", "the version that belongs to your torch"):
        module = import_torchvision("datasets")
    arguments: dict[str, Any] = dict(entry.arguments)
    if split and "split" in arguments:
        arguments["split"] = split
    elif split in ("train", "test") and "train" in arguments:
        arguments["train"] = split == "train"
    elif split:
        raise InputError(f"torchvision's {entry.dataset} has no split '{split}'")
    if entry.reads_files:
        arguments["loader"] = lambda path: Path(path).read_bytes()
    if download:
        if not entry.downloads:
            raise InputError(
                f"torchvision does not download '{known.key}': {known.obtain}; put it into {root}"
            )
        arguments["download"] = True
    try:
        dataset: MapDataset = getattr(module, entry.dataset)(root=str(root), **arguments)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise InputError(f"torchvision's {entry.dataset} in {root}: {error}") from None
    return dataset


def torchvision_names(known: KnownSet, dataset: MapDataset) -> tuple[str, ...]:
    """Class names of a known set, in the order of the labels that `dataset_sources` writes. Raises
    InputError: their source is not installed, or the object has none."""
    entry = torchvision_set(known)
    if entry.names == "digits":
        return tuple(map(str, range(10)))
    if entry.names in ("openai", "clip_benchmark"):
        return find_classnames(known.key, entry.names, known, Path())
    return class_names(dataset, entry.names, entry.spaces)


def class_names(
    dataset: MapDataset, attribute: str = "classes", spaces: str = ""
) -> tuple[str, ...]:
    """Class names by this attribute of a data set object. Raises InputError: it has none."""
    names: Sequence[Any] = getattr(dataset, attribute, ())
    if not names:
        kind = type(dataset).__name__
        raise InputError(f"{kind} has no {attribute}: give a file with one class name a line")
    table = str.maketrans(dict.fromkeys(spaces, " "))
    return tuple(str(name).translate(table).strip() for name in names)


def dataset_sources(
    dataset: MapDataset, relabel: Sequence[int] = (), stamp: str = ""
) -> list[tars.Source]:
    """Every sample of a data set object, whose label is `relabel[own label]` where that is given;
    `stamp` changes with the object's files."""
    name = type(dataset).__name__
    return [
        tars.Source(
            f"{name}[{index}]", partial(_read_sample, dataset, index, tuple(relabel)), stamp
        )
        for index in range(len(dataset))
    ]


def _read_sample(dataset: MapDataset, index: int, relabel: tuple[int, ...]) -> tars.Found:
    image, label = dataset[index]
    if label is None:
        raise tars.UnusableSourceError("has no label")
    number = relabel[int(label)] if relabel else int(label)
    if isinstance(image, Image.Image):
        return tars.Found(tars.encode_png(image), "png", number)
    return replace(tars.image_file(image), answer=number)
