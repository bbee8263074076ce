"""From images, videos or a data set object to an evaluation set, in one call each.

Covers: where class names and templates of a new set come from, what decides that a set is the same.
Not here: reading sources (imagefolder.py ...), writing (write.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from evaclip_model.errors import InputError
from tasks.evaluate.sets.convert import voc
from tasks.evaluate.sets.convert.caption_sets import captioned_sources
from tasks.evaluate.sets.convert.imagefolder import (
    Order,
    class_folders,
    image_sources,
    names_of,
    objectnet_folders,
)
from tasks.evaluate.sets.convert.shard_writer import Conversion, Source, write_set
from tasks.evaluate.sets.convert.torchvision_sets import (
    TORCHVISION,
    dataset_sources,
    open_torchvision,
    torchvision_names,
)
from tasks.evaluate.sets.convert.videos import video_names, video_sources
from tasks.evaluate.sets.prompts import find_classnames, find_templates, read_lines
from tasks.evaluate.sets.set_registry import Kind, KnownSet, NameSource, PromptSource, find_set
from tasks.progress import Report, silent

OBJECTNET = "objectnet"
VOC = {"classification": "voc2007", "multilabel": "voc2007-multilabel"}
"""Kind -> key of the set that VOC's test images become."""
NO_TEMPLATES = "none"
"""Leaves the file of templates out: the recipe must name some then."""


@dataclass(frozen=True)
class Words:
    """What a person chose of a new set's names and prompts."""

    known: KnownSet | None = None
    """The set it is."""
    classnames: str = ""
    """A source's name or a file; the sources' own names where empty."""
    templates: str = ""
    """A source's name, a file, or "none"; the known set's first other source where empty."""

    def names(self, own: Sequence[str]) -> tuple[str, ...]:
        """Class names of a set whose sources call them `own`.

        Raises:
            InputError: a file or source that is not there, or has another number of classes.
        """
        if not self.classnames:
            return tuple(own)
        found = _chosen_names(self.classnames, self.known)
        if len(found) != len(own):
            raise InputError(
                f"{self.classnames} has {len(found)} class names for {len(own)} classes"
            )
        return found

    def prompts(self) -> tuple[str, ...]:
        """Templates of the set.

        Raises:
            InputError: none is chosen and none is known, or their source is not there.
        """
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
    root: Path, folder: Path, words: Words, order: Order = "text", report: Report = silent
) -> Conversion:
    """A folder of one folder of images a class; of ObjectNet, those that ImageNet has too.

    Raises:
        InputError: see `class_folders`, `names_of`, `objectnet_folders`, `Words`, `write_set`.
    """
    own: Sequence[str]
    if words.known is not None and words.known.key == OBJECTNET:
        folders, own = objectnet_folders(root)
    else:
        folders = class_folders(root, order)
        # With names from elsewhere, the folders need not have any.
        own = [one.name for one in folders] if words.classnames else names_of(folders, words.known)
    return _write(folder, image_sources(folders), "imagefolder", words.names(own), words, report)


def convert_torchvision(
    known: KnownSet,
    root: Path,
    folder: Path,
    words: Words,
    download: bool = False,
    report: Report = silent,
) -> Conversion:
    """A set of torchvision's in `root`.

    Raises:
        InputError: see `open_torchvision`, `Words` and `write_set`.
    """
    dataset = open_torchvision(known, root, download)
    entry = TORCHVISION[known.key]
    if words.classnames:
        names = _chosen_names(words.classnames, known)
    else:
        names = torchvision_names(known, dataset)
    sources = dataset_sources(dataset, entry.relabel)
    return _write(folder, sources, known.key, names, words, report)


def convert_videos(
    root: Path, folder: Path, words: Words, listing: Path | None = None, report: Report = silent
) -> Conversion:
    """The centre frames of a folder of one folder of videos a class.

    Raises:
        InputError: see `class_folders`, `video_sources`, `Words` and `write_set`.
    """
    folders = class_folders(root)
    if words.known is not None and words.known.classes != len(folders):
        raise InputError(
            f"{root} has {len(folders)} classes, but {words.known.title} has {words.known.classes}"
        )
    sources = video_sources(folders, listing)
    return _write(folder, sources, "videos", words.names(video_names(folders)), words, report)


def convert_voc(
    root: Path,
    folder: Path,
    words: Words,
    kind: Literal["classification", "multilabel"] = "classification",
    report: Report = silent,
) -> Conversion:
    """VOC's test images in `root` (VOCdevkit/VOC2007): its boxes, or whole with all classes.

    Raises:
        InputError: see `box_sources`, `Words` and `write_set`.
    """
    sources = voc.box_sources(root) if kind == "classification" else voc.image_sources(root)
    words = replace(words, known=find_set(VOC[kind]))
    names = words.names(voc.voc_classes(root))
    return _write(folder, sources, f"voc {kind}", names, words, report, kind)


def convert_captions(
    listing: Path, images: Path, folder: Path, split: str = "test", report: Report = silent
) -> Conversion:
    """Images and captions of one split of a file of Karpathy's form.

    Raises:
        InputError: see `captioned_sources` and `write_set`.
    """
    sources = captioned_sources(listing, images, split)
    content = hashlib.sha256(listing.read_bytes()).hexdigest()
    plan = {"form": "captions", "listing": content, "split": split, "sources": _digest(sources)}
    return write_set(folder, sources, kind="retrieval", plan=plan, report=report)


def _write(
    folder: Path,
    sources: Sequence[Source],
    form: str,
    names: Sequence[str],
    words: Words,
    report: Report,
    kind: Kind = "classification",
) -> Conversion:
    plan: dict[str, Any] = {"form": form, "sources": _digest(sources)}
    return write_set(
        folder,
        sources,
        kind=kind,
        plan=plan,
        classnames=names,
        templates=words.prompts(),
        report=report,
    )


def _chosen_names(chosen: str, known: KnownSet | None) -> tuple[str, ...]:
    for source in get_args(NameSource):
        if chosen == source != "dataset":
            return find_classnames(known.key if known else "new", source, known, Path())
    return read_lines(Path(chosen), "one class name a line")


def _digest(sources: Sequence[Source]) -> str:
    """16 hex digits over the list of sources: a count alone does not tell two lists apart."""
    return hashlib.sha256("\n".join(source.name for source in sources).encode()).hexdigest()[:16]
