"""Image files in a folder, as sources of an evaluation set.

Every file is a source: one that is not an image is listed with its reason, none is passed over by
its suffix. A list leads to files inside its folder of images only.
"""

import json
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from evaclip_model.errors import InputError, shorten_error
from evaclip_model.reading.image_decoder import MAGIC_BYTES, MAX_BYTES, identify_format
from evaclip_model.zeroshot.set_layout import is_system_file
from tasks.evaluate.sets.convert.shard_writer import (
    Answer,
    Found,
    Source,
    UnusableSourceError,
    image_file,
)

_KNOWN_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))


def walk_files(folder: Path) -> Iterator[Path]:
    """Every file below `folder`, by path, those in linked folders too; each real folder once a
    branch, so that a link to a folder above it ends."""
    yield from _walk_folder(folder, (folder.resolve(),))


def image_source(path: Path, answer: Answer) -> Source:
    return Source(str(path), partial(_read_file, path, answer), stamp_of(path))


def stamp_of(path: Path) -> str:
    """Size and time of change of a file; empty where it is missing."""
    try:
        stat = path.stat()
    except OSError:
        return ""
    return f"{stat.st_size} {stat.st_mtime_ns}"


def path_inside(folder: Path, name: str, where: str) -> Path:
    """The path that `name`, from a list, has in `folder`. Raises InputError: it leads out of the
    folder, or is empty."""
    inside = os.path.abspath(folder)
    relative = os.path.relpath(os.path.join(inside, name), inside) if "\0" not in name else ".."
    if relative == "." or relative.split(os.sep)[0] == os.pardir:
        raise InputError(
            f"{where}: '{name[:200]}' is not a file inside {folder}: give the folder of images "
            "that its paths lie in"
        )
    return folder / relative


_SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing", "dev"))


def class_folders(root: Path) -> list[Path]:
    """The folders of `root`, sorted as text, links to folders among them. Raises InputError: there
    is none."""
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


def objectnet_classes(root: Path, imagenet: bool = False) -> dict[Path, Any]:
    """Folder -> name of the classes that ObjectNet shares with ImageNet, or with `imagenet` the
    numbers of ImageNet's classes that each stands for, by ObjectNet's own mappings.

    Args:
        root: ObjectNet's folder, with `images` and `mappings` in it.

    Raises InputError: it has not, or a class has no folder.
    """
    mappings = root / "mappings"
    try:
        names, shared = (
            json.loads((mappings / f"{name}.json").read_text())
            for name in ("folder_to_objectnet_label", "objectnet_to_imagenet_1k")
        )
        found = {
            folder: names[folder].lower() for folder in sorted(names) if names[folder] in shared
        }
        if imagenet:
            line_of = json.loads((mappings / "pytorch_to_imagenet_2012_id.json").read_text())
            lines = (mappings / "imagenet_to_label_2012_v2").read_text().splitlines()
            first = min(line_of.values())  # its numbers count from 0 or from 1
            label_of = {lines[line - first].strip(): int(label) for label, line in line_of.items()}
            found = {
                folder: tuple(sorted(label_of[one] for one in shared[names[folder]].split("; ")))
                for folder in found
            }
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(
            f"{root} is not ObjectNet's folder ({shorten_error(error)}): expected images and the "
            "four files of mappings in it"
        ) from None
    where = "folder_to_objectnet_label.json"
    placed = {path_inside(root / "images", folder, where): found[folder] for folder in found}
    for folder in placed:
        if not folder.is_dir():
            raise InputError(f"{folder} is missing: unpack all of ObjectNet's images")
    return placed


def image_sources(labels: Mapping[Path, Any]) -> list[Source]:
    """Every file of every class folder (folder -> its answer), class by class, by path. Raises
    InputError: there is none."""
    ordered = sorted(labels.items(), key=lambda item: item[1])
    found = [image_source(path, label) for folder, label in ordered for path in walk_files(folder)]
    if not found:
        raise InputError(f"{ordered[0][0].parent} has no file in its folders")
    return found


class FileFinder:
    """Finds the files that a list names in a folder: by path, else by name without suffix."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._by_stem: dict[str, list[Path]] | None = None

    def find_file(self, name: str, where: str) -> Path:
        """The file called `name`; the path it should have where it is missing. Raises InputError:
        it leads out of the folder, or several files could be meant."""
        path = path_inside(self._folder, name, where)
        if path.exists():
            return path
        stem = path.name
        if path.suffix.lower() in _KNOWN_SUFFIXES or os.sep in name:
            return path
        if self._by_stem is None:
            self._by_stem = {}
            for file in walk_files(self._folder):
                self._by_stem.setdefault(file.stem, []).append(file)
        found = self._by_stem.get(stem, [])
        if len(found) > 1:
            raise InputError(f"{where}: '{name}' could be {found[0]} or {found[1]}: give its path")
        return found[0] if found else path


def _walk_folder(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            real = entry.resolve()
            if real not in above and not (
                entry.name.startswith(".") or is_system_file(f"{entry.name}/x")
            ):
                yield from _walk_folder(entry, (*above, real))
        else:
            yield entry


def _read_file(path: Path, answer: Answer) -> Found:
    if is_system_file(path.name):
        raise UnusableSourceError("is a file of the operating system")
    if path.stat().st_size > MAX_BYTES:
        raise UnusableSourceError(f"has more than {MAX_BYTES >> 20} MiB")
    if path.suffix.lower() not in _KNOWN_SUFFIXES:
        with path.open("rb") as file:  # most other files are large and not images
            if identify_format(file.read(MAGIC_BYTES)) is None:
                kind = path.suffix.lower() or "no suffix"
                raise UnusableSourceError(f"is not an image ({kind})")
    extension, content = image_file(path.read_bytes())
    return Found(content, extension, answer)
