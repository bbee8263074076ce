"""Image files in a folder, as sources of an evaluation set.

Every file is a source: one that is not an image is listed with its reason, none is passed over by
its suffix. A list leads to files inside its folder of images only.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from evaclip_model.errors import InputError, shorten_error
from evaclip_model.files import refuse_special
from evaclip_model.reading.image_decoder import MAGIC_BYTES, MAX_BYTES, identify_format
from evaclip_model.zeroshot.set_layout import is_system_file
from tasks.evaluate.sets.convert.shard_writer import Found, Source, UnusableSourceError, image_file

_KNOWN_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
_SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing", "dev"))


def walk_files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Every file below `folder`, by path, those in linked folders too; each real folder once a
    branch (`above`), so that a link to a folder above it ends."""
    above = (*above, folder.resolve())
    for entry in sorted(folder.iterdir()):
        if not entry.is_dir():
            refuse_special(entry)
            yield entry
        elif _is_visible(entry) and entry.resolve() not in above:
            yield from walk_files(entry, above)


def group_by_stem(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Files by their names without suffix."""
    found: dict[str, list[Path]] = {}
    for file in files:
        found.setdefault(file.stem, []).append(file)
    return found


def image_source(path: Path, answer: Any) -> Source:
    return Source(str(path), partial(_read_image, path), stamp_of(path), answer)


def stamp_of(path: Path) -> str:
    """Size and time of change of a file; empty where it is missing."""
    with suppress(OSError):
        stat = path.stat()
        return f"{stat.st_size} {stat.st_mtime_ns}"
    return ""


def path_inside(folder: Path, name: str, where: str) -> Path:
    """The path of a list's `name` in `folder`. Raises InputError: it leads out, or is empty."""
    inside = os.path.abspath(folder)
    relative = os.path.relpath(os.path.join(inside, name), inside) if "\0" not in name else ".."
    if relative == "." or relative.split(os.sep)[0] == os.pardir:
        raise InputError(
            f"{where}: '{name[:200]}' is not a file inside {folder}: give the folder of images "
            "that its paths lie in"
        )
    return folder / relative


def class_folders(root: Path) -> dict[Path, tuple[str, ...]]:
    """The folders of `root`, sorted as text, and their names. Raises InputError: there is none, or
    they are splits."""
    if not root.is_dir():
        raise InputError(f"{root} is not a folder: expected a folder of one folder a class")
    folders = [path for path in root.iterdir() if path.is_dir() and _is_visible(path)]
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
    return {path: (path.name,) for path in sorted(folders, key=lambda path: path.name)}


def objectnet_classes(root: Path, imagenet: bool = False) -> dict[Path, tuple[str, ...]]:
    """Folder -> name of the classes that ObjectNet shares with ImageNet, or with `imagenet` the
    numbers of ImageNet's classes that each stands for, by ObjectNet's own mappings. Raises
    InputError: `root` has no `images` and `mappings`, or a class has no folder."""
    mappings = root / "mappings"
    try:
        names, shared = (
            json.loads((mappings / f"{name}.json").read_text())
            for name in ("folder_to_objectnet_label", "objectnet_to_imagenet_1k")
        )
        found: dict[str, tuple[str, ...]] = {
            folder: (name.lower(),) for folder, name in names.items() if name in shared
        }
        if imagenet:
            line_of = json.loads((mappings / "pytorch_to_imagenet_2012_id.json").read_text())
            lines = (mappings / "imagenet_to_label_2012_v2").read_text().splitlines()
            first = min(line_of.values())  # its numbers count from 0 or from 1
            label_of = {lines[line - first].strip(): label for label, line in line_of.items()}
            found = {
                folder: tuple(label_of[one] for one in shared[names[folder]].split("; "))
                for folder in found
            }
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(
            f"{root} is not ObjectNet's folder ({shorten_error(error)}): expected images and the "
            "four files of mappings in it"
        ) from None
    where = "folder_to_objectnet_label.json"
    placed = {path_inside(root / "images", one, where): found[one] for one in sorted(found)}
    for folder in placed:
        if not folder.is_dir():
            raise InputError(f"{folder} is missing: unpack all of ObjectNet's images")
    return placed


class FileFinder:
    """Finds the files that a list names in a folder: by path, else by name without suffix."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def _by_stem(self) -> dict[str, list[Path]]:
        return group_by_stem(walk_files(self._folder))

    def find_file(self, name: str, where: str) -> Path:
        """The file called `name`; the path it should have where it is missing. Raises InputError:
        it leads out of the folder, or several files could be meant."""
        path = path_inside(self._folder, name, where)
        if "\\" in name and not path.exists():  # as Windows wrote it
            path = path_inside(self._folder, name.replace("\\", "/"), where)
        refuse_special(path)
        if path.exists() or path.suffix.lower() in _KNOWN_SUFFIXES or os.sep in name:
            return path
        found = self._by_stem.get(path.name, [])
        if len(found) > 1:
            raise InputError(f"{where}: '{name}' could be {found[0]} or {found[1]}: give its path")
        return found[0] if found else path


def _is_visible(folder: Path) -> bool:
    return folder.name[0] != "." and not is_system_file(f"{folder.name}/x")


def _read_image(path: Path) -> Found:
    if is_system_file(path.name):
        raise UnusableSourceError("is a file of the operating system")
    if path.stat().st_size > MAX_BYTES:
        raise UnusableSourceError(f"has more than {MAX_BYTES >> 20} MiB")
    if path.suffix.lower() not in _KNOWN_SUFFIXES:
        with path.open("rb") as file:  # most other files are large and not images
            if identify_format(file.read(MAGIC_BYTES)) is None:
                kind = path.suffix.lower() or "no suffix"
                raise UnusableSourceError(f"is not an image ({kind})")
    return image_file(path.read_bytes())
