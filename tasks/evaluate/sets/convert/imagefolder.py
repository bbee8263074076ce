"""A folder of folders of images, one a class, as an evaluation set."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from evaclip_model.errors import InputError
from evaclip_model.zeroshot.set_layout import is_system_file
from tasks.evaluate.sets.convert.shard_writer import Source
from tasks.evaluate.sets.convert.source_images import image_source, path_inside, walk_files

_SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing", "dev"))


def class_folders(root: Path) -> list[Path]:
    """The folders of `root`, sorted as text, links to folders among them.

    Raises:
        InputError: there is none.
    """
    if not root.is_dir():
        raise InputError(f"{root} is not a folder: expected a folder of one folder a class")
    folders = [
        path
        for path in root.iterdir()
        if path.is_dir() and path.name[0] != "." and not is_system_file(f"{path.name}/x")
    ]
    if not folders:
        raise InputError(
            f"{root} has no folder in it: expected one a class (for images in one folder with a "
            "list of their classes: evalsets convert table)"
        )
    if {path.name.casefold() for path in folders} <= _SPLITS:
        raise InputError(
            f"{root} has the folders {', '.join(sorted(path.name for path in folders))}, which are "
            "splits, not classes: give one of them"
        )
    return sorted(folders, key=lambda path: path.name)


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
    folders = [
        path_inside(root / "images", name, "folder_to_objectnet_label.json")
        for name in sorted(labels)
        if labels[name] in shared
    ]
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is missing: unpack all of ObjectNet's images")
    return folders, tuple(labels[folder.name].lower() for folder in folders)


def image_sources(labels: Mapping[Path, int]) -> list[Source]:
    """Every file of every class folder (folder -> label), class by class, by path.

    Raises:
        InputError: there is none.
    """
    ordered = sorted(labels.items(), key=lambda item: item[1])
    found = [image_source(path, label) for folder, label in ordered for path in walk_files(folder)]
    if not found:
        raise InputError(f"{ordered[0][0].parent} has no file in its folders")
    return found
