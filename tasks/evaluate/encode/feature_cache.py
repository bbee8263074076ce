"""Features on disk: blocks that are whole or absent, and the bounded cache they lie in.

A block is written beside its place, synced and renamed, and holds a hash of its content: a block
that a crash tore or that was damaged later reads as absent, and is computed again.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from evaclip_model.files import replace_file
from evaclip_model.weights.tensor_files import write_tensors

SUFFIX = ".safetensors"
_HASH = "sha256"
_USED = ".used"
"""File of a folder; its time is that of the last use of the folder."""


def write_block(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Put a block in its place, whole.

    Raises:
        OSError: the disk is full.
    """
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path, sync=False) as beside:  # write_tensors syncs
        write_tensors(plain, beside, metadata={_HASH: _hash_tensors(plain)})


def read_block(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a block; None if the block is absent or damaged."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            said = (file.metadata() or {}).get(_HASH)
    except (OSError, SafetensorError):
        return None
    return tensors if said == _hash_tensors(tensors) else None


def _hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Cache:
    """Folders of blocks under one root, with a limit on their bytes together."""

    root: Path
    most_bytes: int
    """Most bytes that `remove_oldest` keeps."""

    def open_folder(self, *names: str) -> Path:
        """The folder with these names, created where missing and marked as used now."""
        folder = self.root.joinpath(*names)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _USED).touch()
        return folder

    def remove_oldest(self) -> None:
        """Remove the least recently used folders until the rest fits."""
        by_age = sorted(self.root.rglob(_USED), key=_last_use, reverse=True)
        total = 0
        for mark in by_age:
            total += sum(_folder_bytes(file) for file in mark.parent.iterdir())
            if total > self.most_bytes:
                shutil.rmtree(mark.parent, ignore_errors=True)


def _last_use(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _folder_bytes(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0
