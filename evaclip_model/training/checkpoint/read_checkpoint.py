"""Restoring a checkpoint: found, checked by all ranks, and only then read.

Every shard is read once by one rank, which sums its checksum; all ranks tell each other what they
found, and decide alike before any tensor is touched. Then each reads the pieces it holds.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from evaclip_model.errors import InputError
from evaclip_model.model.model_config import ModelConfig
from evaclip_model.training.checkpoint.consensus import Peers
from evaclip_model.training.checkpoint.storage import Place, place_of
from evaclip_model.training.config import TrainConfig
from evaclip_model.training.engine.engine import StateFragment
from evaclip_model.weights.checkpoint_format import (
    MANIFEST,
    SLAB_BYTES,
    CheckpointManifest,
    StoredPiece,
    TrainingProgress,
    UnusableCheckpoint,
    bytes_of,
    checked_pieces,
    describe_difference,
    sizes_of,
)

_log = logging.getLogger(__name__)


def settings_of(config: TrainConfig, architecture: ModelConfig) -> dict[str, Any]:
    """The settings that a run's checkpoints belong to, `TrainingProgress.settings`; `architecture`
    at the size of its images."""
    return {**config.deciding, "model": architecture.model_dump(mode="json")}


def load_newest(
    location: Path | str, fragments: Sequence[StateFragment], settings: Mapping[str, Any]
) -> TrainingProgress | None:
    """Fill `fragments` from the newest checkpoint that is whole; None: there is none. Every rank
    calls it. One that is not whole is passed over, and the log says why.

    Raises:
        InputError: the checkpoints belong to other settings, or to a later version of this package;
            nothing installed knows this kind of URL.
        OSError: the location cannot be read.
    """
    place, peers = place_of(location), Peers.every_rank()
    for step in peers.run_on_first(place.list_steps):
        where = place.full_name(step, MANIFEST)
        try:
            manifest = CheckpointManifest.from_text(
                peers.run_on_first(partial(_read_text, place, step)), where
            )
            _require_same(manifest.progress.settings, settings, where)
            pieces = _check_shards(place, peers, step, manifest, fragments)
        except UnusableCheckpoint as fault:
            if peers.rank == 0:
                _log.warning("checkpoint of step %d is passed over: %s", step, fault)
            continue
        peers.run_everywhere(partial(_fill_fragments, fragments, place, step, manifest, pieces))
        return manifest.progress
    return None


def _read_text(place: Place, step: int) -> str:
    with place.open_file(step, MANIFEST) as file:
        return file.read().decode(errors="replace")


def _require_same(stored: Mapping[str, Any], present: Mapping[str, Any], where: str) -> None:
    present = json.loads(json.dumps(present))
    for name in sorted({*stored, *present}):
        if stored.get(name) != present.get(name):
            raise InputError(
                f"{where} was saved with {name} = {json.dumps(stored.get(name))}, which is "
                f"{json.dumps(present.get(name))} now: set it back, or train in another place"
            )


def _check_shards(
    place: Place,
    peers: Peers,
    step: int,
    manifest: CheckpointManifest,
    fragments: Sequence[StateFragment],
) -> list[StoredPiece]:
    """Pieces of all shards, when they are as they were written and what all ranks need.

    Raises: UnusableCheckpoint: they are not; the same on every rank.
    """
    found = peers.run_everywhere(lambda: _share_of_check(place, peers, step, manifest))
    faults = [fault for _, fault in found if fault is not None]
    if faults:
        raise UnusableCheckpoint(faults[0])
    pieces = [piece for share, _ in found for piece in share]
    where = place.full_name(step, MANIFEST).removesuffix(f"/{MANIFEST}")
    wanted: dict[tuple[str, str], int] = defaultdict(int)
    for ends in peers.gather_values(_fragment_ends(fragments)):
        for held, end in ends.items():
            wanted[held] = max(wanted[held], end)
    reason = describe_difference(sizes_of(pieces, where), wanted)
    if reason is not None:
        raise UnusableCheckpoint(f"{where} {reason}")
    return pieces


def _share_of_check(
    place: Place, peers: Peers, step: int, manifest: CheckpointManifest
) -> tuple[list[StoredPiece], str | None]:
    """Pieces of the shards that fall to this rank, or what is wrong with one of them."""
    pieces = []
    try:
        for number in range(peers.rank, len(manifest.shards), peers.count):
            shard = manifest.shards[number]
            where = place.full_name(step, shard.name)
            try:
                with place.open_file(step, shard.name) as file:
                    pieces += checked_pieces(file, shard, number, where)
            except FileNotFoundError:
                raise UnusableCheckpoint(f"{where} is missing") from None
    except UnusableCheckpoint as fault:
        return [], str(fault)
    return pieces, None


def _fragment_ends(fragments: Sequence[StateFragment]) -> dict[tuple[str, str], int]:
    ends: dict[tuple[str, str], int] = defaultdict(int)
    for fragment in fragments:
        for kind, tensor in fragment.tensors.items():
            held = (fragment.name, kind)
            ends[held] = max(ends[held], fragment.offset + tensor.numel())
    return dict(ends)


def _fill_fragments(
    fragments: Sequence[StateFragment],
    place: Place,
    step: int,
    manifest: CheckpointManifest,
    pieces: Iterable[StoredPiece],
) -> None:
    """Read this rank's fragments, shard by shard and from front to back, a slab at a time."""
    index: dict[tuple[str, str], list[StoredPiece]] = defaultdict(list)
    for piece in pieces:
        index[piece.name, piece.kind].append(piece)
    reads: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
    for fragment in fragments:
        for kind, tensor in fragment.tensors.items():
            for piece in index[fragment.name, kind]:
                low = max(piece.offset, fragment.offset)
                high = min(piece.end, fragment.offset + tensor.numel())
                if low < high:
                    part = tensor.detach()[low - fragment.offset : high - fragment.offset]
                    begin = piece.place + (low - piece.offset) * tensor.element_size()
                    reads[piece.shard].append((begin, part))
    buffer = torch.empty(SLAB_BYTES // 4)
    for shard, parts in sorted(reads.items()):
        with place.open_file(step, manifest.shards[shard].name) as file:
            for begin, part in sorted(parts, key=lambda read: read[0]):
                file.seek(begin)
                _read_into(part, file, buffer)


def _read_into(tensor: Tensor, file: BinaryIO, buffer: Tensor) -> None:
    for done in range(0, tensor.numel(), buffer.numel()):
        part = tensor[done : done + buffer.numel()]
        slab = buffer[: part.numel()]
        into, read = bytes_of(slab), 0
        while read < len(into):
            count = file.readinto(into[read:])  # type: ignore[attr-defined]
            if not count:
                raise OSError(f"{file} ended early, although it was whole a moment ago")
            read += count
        part.copy_(slab)
