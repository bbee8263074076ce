"""Converters of images, videos, tables or a data set object into an evaluation set."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from evaclip_model.errors import InputError
from evaclip_model.zeroshot.imagenet_prompts import imagenet_classnames
from evaclip_model.zeroshot.set_layout import is_system_file
from tasks.evaluate.sets.choice_questions import Question
from tasks.evaluate.sets.class_order import ClassOrder, Words, order_classes
from tasks.evaluate.sets.convert.caption_sets import captioned_sources
from tasks.evaluate.sets.convert.choice_sets import choice_sources
from tasks.evaluate.sets.convert.label_table import LabelTable, read_label_table
from tasks.evaluate.sets.convert.shard_writer import Conversion, Source, write_set
from tasks.evaluate.sets.convert.source_images import (
    class_folders,
    image_source,
    objectnet_classes,
    stamp_of,
    walk_files,
)
from tasks.evaluate.sets.convert.torchvision_sets import (
    dataset_sources,
    open_torchvision,
    torchvision_names,
    torchvision_set,
)
from tasks.evaluate.sets.convert.videos import find_videos
from tasks.evaluate.sets.convert.voc import read_voc
from tasks.evaluate.sets.set_registry import Kind, KnownSet, find_set
from tasks.progress import Report, report_nothing

OBJECTNET, OBJECTNET_1000 = "objectnet", "objectnet-1000"


def convert_imagefolder(
    root: Path, folder: Path, words: Words, report: Report = report_nothing
) -> Conversion:
    """A folder of one folder of images a class; of ObjectNet, those that ImageNet has too, with
    their own names or with the labels of ImageNet's thousand that each of them stands for."""
    key = words.known.key if words.known else ""
    several, is_objectnet = key == OBJECTNET_1000, key in (OBJECTNET, OBJECTNET_1000)
    words_of = objectnet_classes(root, several) if is_objectnet else class_folders(root)
    images = [image_source(one, said) for at, said in words_of.items() for one in walk_files(at)]
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
) -> Conversion:
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
) -> Conversion:
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
) -> Conversion:
    """The centre frames of the videos below `root`, by their folders or a list."""
    table = find_videos(root, listing)
    origin = ("videos", root, listing or "")
    return _write_table(folder, table, origin, words, report, listing=listing)


def convert_voc(
    root: Path, folder: Path, words: Words, whole: bool = False, report: Report = report_nothing
) -> Conversion:
    table = read_voc(root, whole)
    classes = order_classes(table.words, words, where=str(root))
    words = replace(words, known=find_set("voc2007-multilabel" if whole else "voc2007"))
    origin = ("voc multilabel" if whole else "voc classification", root)
    return _write_table(folder, table, origin, words, report, classes)


def convert_captions(
    listing: Path, images: Path, folder: Path, split: str = "test", report: Report = report_nothing
) -> Conversion:
    sources = captioned_sources(listing, images, split)
    origin = ("captions", listing, images, split)
    return _write_set(folder, sources, origin, report, kind="retrieval", listing=listing)


def convert_choice(
    listing: Path, images: Path, folder: Path, report: Report = report_nothing
) -> Conversion:
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
) -> Conversion:
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
    sources: Sequence[Source],
    origin: Sequence[str | Path],
    report: Report,
    *,
    kind: Kind = "classification",
    classes: ClassOrder | None = None,
    words: Words | None = None,
    listing: Path | None = None,
    questions: Sequence[Question] = (),
) -> Conversion:
    places = [str(one.absolute() if isinstance(one, Path) else one) for one in origin]
    plan = {"origin": places, "sources": _digest_lines(f"{s.name}\t{s.stamp}" for s in sources)}
    if classes is not None:
        plan["labels"] = _digest_lines([repr(sorted(classes.labels.items()))])
    if listing is not None and listing.is_dir():
        plan["listing"] = _stamp_of_files(listing)
    elif listing is not None:
        plan["listing"] = hashlib.sha256(listing.read_bytes()).hexdigest()
    made = write_set(
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
    return _digest_lines(f"{path}\t{stamp_of(path)}" for path in files)
