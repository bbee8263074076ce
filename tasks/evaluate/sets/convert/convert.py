"""Converters of images, videos, tables or a data set object into an evaluation set."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from evaclip_model.errors import InputError
from evaclip_model.zeroshot.imagenet_prompts import imagenet_classnames
from evaclip_model.zeroshot.set_layout import is_system_file, read_lines
from tasks.evaluate.sets.class_order import (
    ClassOrder,
    Order,
    order_classes,
    read_class_names,
)
from tasks.evaluate.sets.convert.caption_sets import captioned_sources
from tasks.evaluate.sets.convert.choice_sets import choice_sources
from tasks.evaluate.sets.convert.label_table import read_label_table
from tasks.evaluate.sets.convert.shard_writer import Conversion, Source, write_set
from tasks.evaluate.sets.convert.source_images import (
    class_folders,
    image_source,
    image_sources,
    objectnet_classes,
    stamp_of,
)
from tasks.evaluate.sets.convert.torchvision_sets import (
    dataset_sources,
    open_torchvision,
    torchvision_names,
    torchvision_set,
    torchvision_words,
)
from tasks.evaluate.sets.convert.videos import find_videos
from tasks.evaluate.sets.convert.voc import voc_classes, voc_sources
from tasks.evaluate.sets.prompts import find_templates
from tasks.evaluate.sets.set_registry import Kind, KnownSet, PromptSource, find_set
from tasks.progress import Report, report_nothing

OBJECTNET, OBJECTNET_1000 = "objectnet", "objectnet-1000"
VOC = {"classification": "voc2007", "multilabel": "voc2007-multilabel"}
"""Kind -> key of the set that VOC's test images become."""
NO_TEMPLATES = "none"
"""Leaves the file of templates out: the recipe must name some then."""


@dataclass(frozen=True)
class Words:
    """A person's choices of a new set's names and prompts."""

    known: KnownSet | None = None
    """The set it is."""
    classnames: str = ""
    """A source's name or a file (`read_class_names`); the rule of class_order.py where empty."""
    templates: str = ""
    """A source's name, a file, or "none"; the known set's first other source where empty."""
    order: Order = ""
    """Count of numbered classes."""
    first: int | None = None
    """Number of the first class, where classes are numbers; told from them where unset."""

    def order_classes(
        self, words: Sequence[str], where: str, display_names: Mapping[str, str] | None = None
    ) -> ClassOrder:
        """Labels and names of the classes that the source calls `words`."""
        chosen = read_class_names(self.classnames, self.known) if self.classnames else None
        return order_classes(
            words,
            chosen,
            self.known,
            where=where,
            display_names=display_names,
            order=self.order,
            first=self.first,
        )

    def set_templates(self) -> tuple[str, ...]:
        chosen = self.templates
        if not chosen and self.known is not None:
            # A set to be written has no templates of its own yet.
            chosen = next((one for one in self.known.prompts if one != "dataset"), "")
        if chosen == NO_TEMPLATES:
            return ()
        key = self.known.key if self.known else "new"
        for source in get_args(PromptSource):
            if chosen == source != "dataset":
                return find_templates(key, source, self.known, Path())
        if not chosen:
            raise InputError(
                "which prompt templates has this set? give --templates FILE, with {c} for the "
                "class name in each line, or --templates none"
            )
        return read_lines(Path(chosen), "one prompt template with {c} a line")


def convert_imagefolder(
    root: Path, folder: Path, words: Words, report: Report = report_nothing
) -> Conversion:
    """A folder of one folder of images a class; of ObjectNet, those that ImageNet has too, with
    their own names or with the labels of ImageNet's thousand that each of them stands for."""
    key = words.known.key if words.known else ""
    if key == OBJECTNET_1000:
        names = imagenet_classnames()
        classes = ClassOrder(names, {str(label): label for label in range(len(names))})
        sources, origin = image_sources(objectnet_classes(root, imagenet=True)), (key, root)
        return _write_set(folder, sources, origin, classes, words, report, "multilabel")
    beside, own, display = 0, words, {}
    if key == OBJECTNET:
        shared = objectnet_classes(root)
        folders, own = [*shared], replace(words, known=None)
        display = {one.name: name for one, name in shared.items()}
    else:
        folders = class_folders(root)
        loose = (path for path in root.iterdir() if path.is_file())
        beside = sum(not is_system_file(path.name) for path in loose)
    classes = own.order_classes([one.name for one in folders], str(root), display)
    sources = image_sources({one: classes.labels[one.name] for one in folders})
    if beside:
        remark = f"{beside} files beside the class folders of {root} were left out"
        classes = replace(classes, joined=(*classes.joined, remark))
    return _write_set(folder, sources, ("imagefolder", root), classes, words, report)


def convert_table(
    listing: Path,
    images: Path,
    folder: Path,
    words: Words,
    *,
    path_column: str = "",
    label_column: str = "",
    several: bool = False,
    split: str = "",
    report: Report = report_nothing,
) -> Conversion:
    """Images that a table names with their labels; one label each, or several."""
    table = read_label_table(
        listing,
        images,
        path_column=path_column,
        label_column=label_column,
        several=several,
        split=split,
    )
    classes = words.order_classes(table.words, str(listing))
    labels = classes.labels

    def answer(chosen: Sequence[str]) -> int | list[int]:
        return sorted(labels[word] for word in chosen) if table.several else labels[chosen[0]]

    sources = [image_source(one.path, answer(one.words)) for one in table.images]
    kind: Kind = "multilabel" if table.several else "classification"
    return _write_set(
        folder, sources, ("table", listing, images), classes, words, report, kind, listing
    )


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
    dataset = open_torchvision(known, root, download, split)
    entry = torchvision_set(known)
    relabel = entry.relabel
    names = torchvision_names(known, dataset)
    classes = ClassOrder(names, {name: label for label, name in enumerate(names)})
    if words.classnames:
        own = torchvision_words(dataset, names)
        where = f"torchvision's {entry.dataset}"
        classes = replace(words, known=known).order_classes(own, where)
        # The list's labels, in the order of torchvision's own.
        relabel = tuple(classes.labels[own[label]] for label in relabel or range(len(own)))
    sources = dataset_sources(dataset, relabel, stamp=_stamp_of_files(root))
    origin = (known.key, root, split) if split else (known.key, root)
    return _write_set(folder, sources, origin, classes, words, report)


def convert_videos(
    root: Path,
    folder: Path,
    words: Words,
    listing: Path | None = None,
    report: Report = report_nothing,
) -> Conversion:
    """The centre frames of the videos below `root`, by their folders or a list."""
    found = find_videos(root, listing)
    classes = words.order_classes(found.words, str(root), found.display_names)
    sources = found.list_sources(classes.labels)
    origin = ("videos", root, listing or "")
    return _write_set(folder, sources, origin, classes, words, report, listing=listing)


def convert_voc(
    root: Path,
    folder: Path,
    words: Words,
    kind: Literal["classification", "multilabel"] = "classification",
    report: Report = report_nothing,
) -> Conversion:
    own = voc_classes(root)
    classes = words.order_classes(own, str(root))
    places = [classes.labels[word] for word in own]
    sources = voc_sources(root, places, whole=kind == "multilabel")
    words = replace(words, known=find_set(VOC[kind]))
    return _write_set(folder, sources, (f"voc {kind}", root), classes, words, report, kind)


def convert_captions(
    listing: Path, images: Path, folder: Path, split: str = "test", report: Report = report_nothing
) -> Conversion:
    sources = captioned_sources(listing, images, split)
    origin = ["captions", str(listing.absolute()), str(images.absolute()), split]
    plan = {"origin": origin, "listing": _digest_of(listing), "sources": _digest_sources(sources)}
    return write_set(folder, sources, kind="retrieval", plan=plan, report=report)


def convert_choice(
    listing: Path, images: Path, folder: Path, report: Report = report_nothing
) -> Conversion:
    sources, questions = choice_sources(listing, images)
    origin = ["choice", str(listing.absolute()), str(images.absolute())]
    plan = {"origin": origin, "sources": _digest_sources(sources)}
    return write_set(folder, sources, kind="choice", plan=plan, questions=questions, report=report)


def _write_set(
    folder: Path,
    sources: Sequence[Source],
    origin: Sequence[str | Path],
    classes: ClassOrder,
    words: Words,
    report: Report,
    kind: Kind = "classification",
    listing: Path | None = None,
) -> Conversion:
    places = [str(one.absolute() if isinstance(one, Path) else one) for one in origin]
    plan: dict[str, Any] = {"origin": places, "sources": _digest_sources(sources)}
    plan["labels"] = hashlib.sha256(repr(sorted(classes.labels.items())).encode()).hexdigest()[:16]
    if listing is not None:
        plan["listing"] = _digest_of(listing)
    made = write_set(
        folder,
        sources,
        kind=kind,
        plan=plan,
        classnames=classes.names,
        templates=words.set_templates(),
        report=report,
    )
    return replace(made, about_names=classes.remarks)


def _digest_of(listing: Path) -> str:
    if listing.is_dir():
        return _stamp_of_files(listing)
    return hashlib.sha256(listing.read_bytes()).hexdigest()


def _digest_sources(sources: Sequence[Source]) -> str:
    """16 hex digits over the list of sources as they are now."""
    lines = (f"{source.name}\t{source.stamp}" for source in sources)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _stamp_of_files(root: Path) -> str:
    """16 hex digits over all files below `root`, by size and time of change."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    lines = (f"{path}\t{stamp_of(path)}" for path in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
