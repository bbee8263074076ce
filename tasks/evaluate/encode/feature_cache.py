"""Features on disk: blocks that are whole or absent, and the bounded cache they lie in.

Covers: writing and reading one block, the folders of the cache, which of them go when it is full.
Not here: what the features are of (features.py, classifiers.py).

A block is written beside its place, synced and renamed, and holds a hash of its content: what was
torn by a crash or damaged later reads as absent, and is computed again.
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
"""File of a folder whose time says when it was last asked for."""


def write_block(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Put a block in its place, whole.

    Raises:
        OSError: the disk is full.
    """
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path, sync=False) as beside:  # write_tensors syncs
        write_tensors(plain, beside, metadata={_HASH: _hash(plain)})


def read_block(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a block; None if there is none, or none that is as it was written."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            said = (file.metadata() or {}).get(_HASH)
    except (OSError, SafetensorError):
        return None
    return tensors if said == _hash(tensors) else None


def _hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Cache:
    """Folders of blocks under one root, that share a number of bytes."""

    root: Path
    most_bytes: int
    """What is kept at most when `trim` has run."""

    def folder(self, *names: str) -> Path:
        """The folder of what these names stand for; asking for it is using it."""
        folder = self.root.joinpath(*names)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _USED).touch()
        return folder

    def trim(self) -> None:
        """Remove the folders that were asked for longest ago until the rest fits."""
        by_age = sorted(self.root.rglob(_USED), key=_when, reverse=True)
        total = 0
        for mark in by_age:
            total += sum(_size(file) for file in mark.parent.iterdir())
            if total > self.most_bytes:
                shutil.rmtree(mark.parent, ignore_errors=True)


def _when(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0
