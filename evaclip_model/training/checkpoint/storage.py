"""The place of a run's checkpoints: a folder, or a URL that fsspec knows.

An object store has no rename of folders, so neither place is asked for one: a checkpoint's files
have their names at once, and the manifest, put last, makes it whole.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from evaclip_model.files import write_atomically
from evaclip_model.reading.urls import is_url, open_filesystem
from evaclip_model.weights.checkpoint_format import MANIFEST, SLAB_BYTES, step_name, step_of


class CheckpointPlace:
    """Checkpoints of one run, in a folder of a file system that all ranks share or at a URL; every
    rank has access to all of it. All methods may raise OSError."""

    def __init__(self, location: Path | str) -> None:
        """Open the place, where nothing needs to be yet. Raises: InputError: nothing installed
        knows this kind of URL."""
        self._is_here = not is_url(location)
        self._root = str(Path(location).absolute() if self._is_here else location).rstrip("/")
        self._files = open_filesystem(f"file://{self._root}" if self._is_here else self._root)

    def list_steps(self) -> list[int]:
        """Steps of the checkpoints that have a manifest, newest first."""
        found = [step_of(name) for name, files in self._list_files().items() if MANIFEST in files]
        return sorted((step for step in found if step is not None), reverse=True)

    @contextmanager
    def create_file(self, step: int, name: str) -> Iterator[BinaryIO]:
        """A context with the new file of a checkpoint in the making, to write to; when it is left
        without an error, the file will outlast a crash of the machine."""
        where = self.full_name(step, name)
        self._files.makedirs(where.rpartition("/")[0], exist_ok=True)
        if not self._is_here:
            with self._files.open(where, "wb", block_size=SLAB_BYTES) as stored:
                yield stored
            return
        with Path(where).open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def publish_checkpoint(self, step: int, manifest: str) -> None:
        """Make a checkpoint whole, all files of which were written."""
        if self._is_here:
            write_atomically(Path(self.full_name(step, MANIFEST)), manifest)
            return
        with self.create_file(step, MANIFEST) as file:
            file.write(manifest.encode())

    def remove_checkpoint(self, step: int) -> None:
        """Remove a checkpoint, or what was begun of it; it is at no moment without its files and
        with its manifest."""
        self._remove_folder(step_name(step))

    def remove_leftovers(self) -> None:
        """Remove what killed runs began and did not finish."""
        for name, files in self._list_files().items():
            if MANIFEST not in files:
                self._remove_folder(name)

    def open_file(self, step: int, name: str) -> BinaryIO:
        """A file of a checkpoint, to read and seek in."""
        where = self.full_name(step, name)
        if self._is_here:
            return Path(where).open("rb")
        opened: BinaryIO = self._files.open(where, "rb", block_size=SLAB_BYTES)
        return opened

    def full_name(self, step: int, name: str) -> str:
        """A file's name as its owner knows it."""
        return f"{self._root}/{step_name(step)}/{name}"

    def _list_files(self) -> dict[str, set[str]]:
        """Files of everything that has a checkpoint's name."""
        self._files.invalidate_cache()
        found: dict[str, set[str]] = {}
        with suppress(FileNotFoundError):
            for path in self._files.find(self._root):
                *_, folder, name = ["", *str(path).split("/")]
                if step_of(folder) is not None:
                    found.setdefault(folder, set()).add(name)
        return found

    def _remove_folder(self, folder: str) -> None:
        files = self._list_files().get(folder, set())
        for name in sorted(files, key=lambda name: name != MANIFEST):
            self._files.rm_file(f"{self._root}/{folder}/{name}")
        with suppress(OSError):  # object stores have no folders, and none to remove
            self._files.rmdir(f"{self._root}/{folder}")
