"""The place of a run's checkpoints: a folder, or a URL that fsspec knows.

In a folder a checkpoint grows as `step-N.tmp` and gets its name by a rename. An object store has no
rename: there its files have their names at once, and the manifest, put last, makes it whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from evaclip_model.reading.urls import is_url, open_filesystem
from evaclip_model.weights.checkpoint_format import (
    MANIFEST,
    SLAB_BYTES,
    checkpoint_steps,
    step_name,
    step_of,
)

_UNFINISHED = ".tmp"


class FolderPlace:
    """Checkpoints of one run in a folder of a file system that all ranks share; every rank has
    access to all of it. All methods may raise OSError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def list_steps(self) -> list[int]:
        """Steps of the checkpoints that have a manifest, newest first."""
        return checkpoint_steps(self._folder)

    def clear_unpublished(self, step: int) -> None:
        """Remove what was begun for a step and not published; and a published one of an object
        store, which has no room for two."""
        unfinished = self._unfinished_folder(step)
        if unfinished.exists():
            shutil.rmtree(unfinished)

    @contextmanager
    def create_file(self, step: int, name: str) -> Iterator[BinaryIO]:
        """A context with the new file of a checkpoint in the making, to write to; when it is left
        without an error, the file will outlast a crash of the machine."""
        folder = self._unfinished_folder(step)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def publish_checkpoint(self, step: int, manifest: str) -> None:
        """Make a checkpoint whole, all files of which were written; replaces an earlier one."""
        with self.create_file(step, MANIFEST) as file:
            file.write(manifest.encode())
        _sync_folder(self._unfinished_folder(step))
        earlier = self._put_aside(step)
        self._unfinished_folder(step).replace(self._final_folder(step))
        _sync_folder(self._folder)
        shutil.rmtree(earlier, ignore_errors=True)

    def remove_checkpoint(self, step: int) -> None:
        """Remove a checkpoint, which is at no moment without its files and with its manifest."""
        shutil.rmtree(self._put_aside(step), ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Remove what killed runs began and did not finish."""
        for path in self._folder.glob(f"step-*{_UNFINISHED}"):
            shutil.rmtree(path)

    def open_file(self, step: int, name: str) -> BinaryIO:
        """A file of a checkpoint, to read and seek in."""
        return (self._final_folder(step) / name).open("rb")

    def full_name(self, step: int, name: str) -> str:
        """A file's name as its owner knows it."""
        return str(self._final_folder(step) / name)

    def _final_folder(self, step: int) -> Path:
        return self._folder / step_name(step)

    def _unfinished_folder(self, step: int) -> Path:
        return self._folder / f"{step_name(step)}{_UNFINISHED}"

    def _put_aside(self, step: int) -> Path:
        """Move a published checkpoint, if there is one, to a name that is not a checkpoint's."""
        aside = self._folder / f"{step_name(step)}.old{_UNFINISHED}"
        shutil.rmtree(aside, ignore_errors=True)
        with suppress(FileNotFoundError):
            self._final_folder(step).replace(aside)
        return aside


class StorePlace:
    """As `FolderPlace`, in an object store, by its URL."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._files = open_filesystem(url)

    def list_steps(self) -> list[int]:
        found = [step_of(name) for name, files in self._list_files().items() if MANIFEST in files]
        return sorted((step for step in found if step is not None), reverse=True)

    def clear_unpublished(self, step: int) -> None:
        self.remove_checkpoint(step)

    @contextmanager
    def create_file(self, step: int, name: str) -> Iterator[BinaryIO]:
        url = self.full_name(step, name)
        self._files.makedirs(url.rpartition("/")[0], exist_ok=True)
        with self._files.open(url, "wb", block_size=SLAB_BYTES) as file:
            yield file

    def publish_checkpoint(self, step: int, manifest: str) -> None:
        with self.create_file(step, MANIFEST) as file:
            file.write(manifest.encode())

    def remove_checkpoint(self, step: int) -> None:
        self._remove_folder(step_name(step))

    def remove_leftovers(self) -> None:
        for name, files in self._list_files().items():
            if MANIFEST not in files:
                self._remove_folder(name)

    def open_file(self, step: int, name: str) -> BinaryIO:
        opened: BinaryIO = self._files.open(self.full_name(step, name), "rb", block_size=SLAB_BYTES)
        return opened

    def full_name(self, step: int, name: str) -> str:
        return f"{self._url}/{step_name(step)}/{name}"

    def _list_files(self) -> dict[str, set[str]]:
        """Files of everything that has a checkpoint's name."""
        self._files.invalidate_cache()
        found: dict[str, set[str]] = {}
        with suppress(FileNotFoundError):
            for path in self._files.find(self._url):
                *_, folder, name = ["", *str(path).split("/")]
                if step_of(folder) is not None:
                    found.setdefault(folder, set()).add(name)
        return found

    def _remove_folder(self, folder: str) -> None:
        files = self._list_files().get(folder, set())
        for name in sorted(files, key=lambda name: name != MANIFEST):
            self._files.rm_file(f"{self._url}/{folder}/{name}")
        with suppress(OSError):  # object stores have no folders, and none to remove
            self._files.rmdir(f"{self._url}/{folder}")


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


Place = FolderPlace | StorePlace


def place_of(location: Path | str) -> Place:
    """The checkpoints in a folder or at a URL; nothing needs to be there yet.

    Raises: InputError: nothing installed knows this kind of URL.
    """
    return StorePlace(str(location)) if is_url(location) else FolderPlace(Path(location))
