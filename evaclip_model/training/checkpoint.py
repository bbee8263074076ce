"""Training state on disk, addressed by parameter name, so that any number of ranks can take it up.

Covers: writing a checkpoint from all ranks, finding the newest whole one, reading, pruning; its
parameters alone.
Not here: when to write one (trainer.py); finished models (weights.py).

`checkpoints/step-N/` holds `shard-R.safetensors` of each rank that wrote it (fragments named
`parameter@offset#kind`) and `manifest.json`. The folder gets its name by a rename after every file
is on disk: a folder with the name is whole, one ending in `.tmp` is the leavings of a killed run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from evaclip_model.errors import InputError
from evaclip_model.tensor_file import StoredTensor, read_safetensors, write_tensors
from evaclip_model.training.engine import StateFragment

MANIFEST = "manifest.json"
_PREFIX = "step-"


@dataclass(frozen=True)
class Progress:
    """How far training is: everything besides tensors that the next step depends on."""

    step: int
    """Optimizer steps done (batches consumed, those skipped for overflow included)."""
    counters: dict[str, Any]
    """The engine's."""
    bad_samples: dict[str, int]
    """Reason -> samples that could not be used, over all ranks."""
    seconds: float
    """Training time so far."""
    config: str
    """Digest of the settings the state belongs to."""


def save_checkpoint(
    folder: Path, fragments: Sequence[StateFragment], progress: Progress, keep: int
) -> Path:
    """Write `folder/step-N` together with all other ranks; keep the `keep` newest.

    Returns when the checkpoint has its name, on every rank.
    """
    rank, ranks = _rank_and_ranks()
    final = folder / f"{_PREFIX}{progress.step:08d}"
    beside = final.with_name(final.name + ".tmp")
    if rank == 0:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    _barrier()
    shard = beside / f"shard-{rank}.safetensors"
    tensors = {
        f"{fragment.name}@{fragment.offset}#{kind}": tensor.detach().cpu().contiguous()
        for fragment in fragments
        for kind, tensor in fragment.tensors.items()
    }
    write_tensors(tensors, shard)
    sizes: list[Any] = [None] * ranks
    if ranks > 1:
        dist.all_gather_object(sizes, shard.stat().st_size)
    else:
        sizes = [shard.stat().st_size]
    if rank == 0:
        manifest = beside / MANIFEST
        manifest.write_text(json.dumps({"shard_bytes": sizes, "progress": asdict(progress)}))
        _sync(manifest)
        shutil.rmtree(final, ignore_errors=True)
        beside.replace(final)
        _sync(folder)
        for old in checkpoints(folder)[keep:]:
            shutil.rmtree(old)
    _barrier()
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, newest first."""
    found = [
        path
        for path in folder.glob(f"{_PREFIX}*")
        if path.name.removeprefix(_PREFIX).isdigit() and (path / MANIFEST).is_file()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)), reverse=True)


def load_newest(folder: Path, fragments: Sequence[StateFragment], config: str) -> Progress | None:
    """Fill `fragments` from the newest checkpoint that is whole for every rank; none: None.

    Args:
        config: digest of the present settings; a checkpoint of others is passed over.
    """
    rank, _ = _rank_and_ranks()
    found = [str(path) for path in checkpoints(folder)] if rank == 0 else None
    for name in _from_rank_0(found):
        progress, tensors = _read(Path(name), fragments, config)
        if _agreed(progress is not None):
            for destination, value in tensors:
                destination.copy_(value)
            return progress
    return None


def stored_parameters(folder: Path) -> dict[str, list[StoredTensor]]:
    """The parameters in a checkpoint, `folder/step-N`, by name; their values stay on disk.

    Returns:
        For each parameter its fp32 pieces, [n] each; one after another they are all of it, flat.

    Raises:
        InputError: a shard is missing, cut off or unreadable.
    """
    try:
        sizes = json.loads((folder / MANIFEST).read_text())["shard_bytes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / MANIFEST} cannot be read: take another checkpoint") from error
    pieces: dict[str, list[tuple[int, StoredTensor]]] = {}
    for rank in range(len(sizes)):
        for key, tensor in read_safetensors(folder / f"shard-{rank}.safetensors").items():
            place, _, kind = key.rpartition("#")
            name, _, offset = place.rpartition("@")
            if kind == "param":
                pieces.setdefault(name, []).append((int(offset), tensor))
    return {name: _in_a_row(name, found, folder) for name, found in pieces.items()}


def _in_a_row(
    name: str, pieces: Sequence[tuple[int, StoredTensor]], folder: Path
) -> list[StoredTensor]:
    end, ordered = 0, sorted(pieces, key=lambda piece: piece[0])
    for offset, tensor in ordered:
        if offset != end:
            raise InputError(f"{folder} lacks a piece of '{name}': take another checkpoint")
        end += tensor.shape.numel()
    return [tensor for _, tensor in ordered]


def _read(
    path: Path, fragments: Sequence[StateFragment], config: str
) -> tuple[Progress | None, list[tuple[Tensor, Tensor]]]:
    """Progress, and what each of this rank's tensors is to become; None when it is not usable."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        progress = Progress(**manifest["progress"])
        shards = [
            path / f"shard-{rank}.safetensors" for rank in range(len(manifest["shard_bytes"]))
        ]
        sizes = [shard.stat().st_size for shard in shards]
        if progress.config != config or sizes != manifest["shard_bytes"]:
            return None, []
        return progress, list(_slices(shards, fragments))
    except (OSError, ValueError, KeyError, TypeError):
        return None, []


def _slices(
    shards: Sequence[Path], fragments: Sequence[StateFragment]
) -> list[tuple[Tensor, Tensor]]:
    """Pairs of (tensor to fill, what it is to hold), put together from whatever ranks wrote.

    Raises:
        KeyError: an element of a fragment is in no shard.
    """
    index: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
    for shard in shards:
        opened: Any = safe_open(shard, framework="pt")
        for key in opened.keys():  # noqa: SIM118 - a safetensors file is no mapping
            place, _, kind = key.rpartition("#")
            name, _, offset = place.rpartition("@")
            size = opened.get_slice(key).get_shape()[0]
            index.setdefault((name, kind), []).append((int(offset), size, opened, key))
    pairs = []
    for fragment in fragments:
        for kind, tensor in fragment.tensors.items():
            value = torch.empty(tensor.shape, dtype=tensor.dtype)
            missing = tensor.numel()
            for offset, size, opened, key in index[fragment.name, kind]:
                low = max(offset, fragment.offset)
                high = min(offset + size, fragment.offset + tensor.numel())
                if low < high:
                    part = opened.get_slice(key)[low - offset : high - offset]
                    value[low - fragment.offset : high - fragment.offset] = part
                    missing -= high - low
            if missing:
                raise KeyError(fragment.name)
            pairs.append((tensor, value))
    return pairs


def _rank_and_ranks() -> tuple[int, int]:
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def _barrier() -> None:
    if _rank_and_ranks()[1] > 1:
        dist.barrier()


def _agreed(usable: bool) -> bool:
    """Whether it is usable on every rank."""
    ranks = _rank_and_ranks()[1]
    verdicts: list[Any] = [usable] * ranks
    if ranks > 1:
        dist.all_gather_object(verdicts, usable)
    return all(verdicts)


def _from_rank_0(names: list[str] | None) -> list[str]:
    held: list[Any] = [names]
    if _rank_and_ranks()[1] > 1:
        dist.broadcast_object_list(held, src=0)
    return held[0] or []


def _sync(path: Path) -> None:
    """Force a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
