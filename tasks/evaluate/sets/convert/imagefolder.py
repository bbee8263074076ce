"""A folder of folders of images, one a class, as an evaluation set.

Covers: which folder is which label, and what the class is called; ObjectNet's, of which some count.
Not here: writing the set (write.py).

Labels follow the folders' names sorted as text, as torchvision's ImageFolder does, or as numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from evaclip_model.errors import InputError
from evaclip_model.zeroshot.imagenet_prompts import imagenet_classnames
from tasks.evaluate.sets.convert.shard_writer import Found, Source, image_file
from tasks.evaluate.sets.prompts import imagenet_synsets
from tasks.evaluate.sets.set_registry import KnownSet

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"))

Order = Literal["text", "number"]


def class_folders(root: Path, order: Order = "text") -> list[Path]:
    """The folders of `root` in the order of their labels.

    Raises:
        InputError: there is none, or one is no number although `order` says so.
    """
    if not root.is_dir():
        raise InputError(f"{root} is no folder: expected a folder of one folder a class")
    folders = [path for path in root.iterdir() if path.is_dir() and path.name[0] != "."]
    if not folders:
        raise InputError(f"{root} has no folder in it: expected one a class")
    if order == "text":
        return sorted(folders, key=lambda path: path.name)
    for path in folders:
        if not path.name.isdecimal():
            raise InputError(f"{path}: its name is no number, so it gives no label by number")
    ordered = sorted(folders, key=lambda path: int(path.name))
    for label, path in enumerate(ordered):
        if int(path.name) != label:
            raise InputError(f"{root} has no folder {label}: numbered classes count from 0")
    return ordered


def names_of(folders: Sequence[Path], known: KnownSet | None) -> tuple[str, ...]:
    """What the classes of these folders are called, by the folders' own names.

    WordNet ids are ImageNet's names of these classes; numbers are those of its thousand; anything
    else is the name itself, underscores being spaces.

    Raises:
        InputError: the known set has another number of classes, or its names cannot be told.
    """
    if known is not None and known.classes != len(folders):
        raise InputError(
            f"{folders[0].parent} has {len(folders)} classes, but {known.title} has "
            f"{known.classes}: give its own folder, or leave the name of the known set out"
        )
    words = [folder.name for folder in folders]
    places = {synset: index for index, synset in enumerate(imagenet_synsets())}
    if all(word in places for word in words):
        return tuple(imagenet_classnames()[places[word]] for word in words)
    if all(word.isdecimal() for word in words):
        if len(words) != len(places):
            raise InputError(
                f"{folders[0].parent}: its folders are numbers, which are no names: give a file "
                "with one class name a line"
            )
        if [int(word) for word in words] != list(range(len(words))):
            raise InputError(
                f"{folders[0].parent}: its folders are ImageNet's numbers, in the order of text: "
                "give --order number"
            )
        return imagenet_classnames()
    return tuple(" ".join(word.replace("_", " ").split()) for word in words)


def objectnet_folders(root: Path) -> tuple[list[Path], tuple[str, ...]]:
    """The folders of the classes that ObjectNet shares with ImageNet, and what they are called.

    Args:
        root: ObjectNet's folder, with `images` and `mappings` in it.

    Raises:
        InputError: it has not, or a class has no folder.
    """
    try:
        labels, shared = (
            json.loads((root / "mappings" / name).read_text())
            for name in ("folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json")
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"{root} is not ObjectNet's folder ({error}): expected images and mappings in it"
        ) from None
    folders = [root / "images" / name for name in sorted(labels) if labels[name] in shared]
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is missing: unpack all of ObjectNet's images")
    return folders, tuple(labels[folder.name].lower() for folder in folders)


def image_sources(folders: Sequence[Path]) -> list[Source]:
    """Every image file of every class, class by class, by path.

    Raises:
        InputError: there is none.
    """
    found = [
        Source(str(path), partial(_read, path, label))
        for label, folder in enumerate(folders)
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not found:
        raise InputError(f"{folders[0].parent} has no image file in its folders")
    return found


def _read(path: Path, label: int) -> Found:
    extension, content = image_file(path.read_bytes())
    return Found(content, extension, label)
