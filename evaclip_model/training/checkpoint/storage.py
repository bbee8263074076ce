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
    """Checkpoints of one run, in a folder of a file system that all ranks share or at a URL;
    nothing needs to be there yet. All methods may raise OSError."""

    def __init__(self, location: Path | str) -> None:
        """Raises: InputError: nothing installed knows this kind of URL."""
        self._is_here = not is_url(location)
        self._root = str(Path(location).absolute() if self._is_here else location).rstrip("/")
        self._files = open_filesystem(f"file://{self._root}" if self._is_here else self._root)

    def list_steps(self) -> list[int]:
        """Steps of the checkpoints that have a manifest, newest first."""
        found = self._list_files().items()
        return sorted((step for step, files in found if MANIFEST in files), reverse=True)

    @contextmanager
    def create_file(self, step: int, name: str) -> Iterator[BinaryIO]:
        """Yield a new file of a checkpoint in the making; it will outlast a crash of the
        machine."""
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
        """Remove a checkpoint, or what was begun of it, the manifest first."""
        files = self._list_files().get(step, set())
        for name in sorted(files, key=lambda name: name != MANIFEST):
            self._files.rm_file(self.full_name(step, name))
        with suppress(OSError):  # object stores have no folders, and none to remove
            self._files.rmdir(f"{self._root}/{step_name(step)}")

    def remove_leftovers(self) -> None:
        """Remove what killed runs began and did not finish."""
        for step, files in self._list_files().items():
            if MANIFEST not in files:
                self.remove_checkpoint(step)

    def open_file(self, step: int, name: str) -> BinaryIO:
        where = self.full_name(step, name)
        if self._is_here:
            return Path(where).open("rb")
        opened: BinaryIO = self._files.open(where, "rb", block_size=SLAB_BYTES)
        return opened

    def full_name(self, step: int, name: str) -> str:
        return f"{self._root}/{step_name(step)}/{name}"

    def _list_files(self) -> dict[int, set[str]]:
        self._files.invalidate_cache()
        found: dict[int, set[str]] = {}
        with suppress(FileNotFoundError):
            for path in self._files.find(self._root):
                *_, folder, name = ["", *str(path).split("/")]
                step = step_of(folder)
                if step is not None and folder == step_name(step):
                    found.setdefault(step, set()).add(name)
        return found
