"""Taking up a checkpoint: found, checked by all ranks, and only then read.

Covers: the newest whole checkpoint into a rank's tensors; a checkpoint's parameters alone.
Not here: the form of files (form.py), checkpoints of other programs (importing.py).

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
from evaclip_model.training.checkpoint.checkpoint_format import (
    MANIFEST,
    SLAB_BYTES,
    Manifest,
    Piece,
    Progress,
    Unusable,
    bytes_of,
    checked_pieces,
    difference,
    key_parts,
    sizes_of,
    step_name,
)
from evaclip_model.training.checkpoint.consensus import Peers
from evaclip_model.training.checkpoint.storage import FolderPlace, Place, place_of
from evaclip_model.training.engine.engine import StateFragment
from evaclip_model.weights.tensor_files import StoredTensor, read_safetensors

_log = logging.getLogger(__name__)


def load_newest(
    location: Path | str, fragments: Sequence[StateFragment], settings: Mapping[str, Any]
) -> Progress | None:
    """Fill `fragments` from the newest checkpoint that is whole; None: there is none.

    Every rank calls it. One that is not whole is passed over, and the log says why.

    Args:
        location: a folder or URL, as for CheckpointWriter.
        settings: the present ones, as in `Progress.settings`.

    Raises:
        InputError: the checkpoints belong to other settings, or to a later version of this package;
            nothing installed knows this kind of URL.
        OSError: the location cannot be read.
    """
    place, peers = place_of(location), Peers.all()
    for step in peers.first(place.steps):
        where = place.full_name(step, MANIFEST)
        try:
            manifest = Manifest.from_text(peers.first(partial(_text, place, step)), where)
            _require_same(manifest.progress.settings, settings, where)
            pieces = _checked(place, peers, step, manifest, fragments)
        except Unusable as fault:
            if peers.rank == 0:
                _log.warning("checkpoint of step %d is passed over: %s", step, fault)
            continue
        peers.together(partial(_fill, fragments, place, step, manifest, pieces))
        return manifest.progress
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in a folder, newest first."""
    return [folder / step_name(step) for step in FolderPlace(folder).steps()]


def stored_parameters(folder: Path) -> dict[str, list[StoredTensor]]:
    """The parameters in a checkpoint, `folder/step-N`, by name; their values stay on disk.

    Returns:
        For each parameter its fp32 pieces, [n] each; one after another they are all of it, flat.

    Raises:
        InputError: a shard is missing, cut off or unreadable.
    """
    where = folder / MANIFEST
    try:
        manifest = Manifest.from_text(where.read_text(), str(where))
        pieces: dict[str, list[tuple[int, StoredTensor]]] = defaultdict(list)
        for shard in manifest.shards:
            stored = read_safetensors(folder / shard.name)
            if (folder / shard.name).stat().st_size != shard.bytes:
                raise Unusable(f"{folder / shard.name} is not as long as it was written")
            for key, tensor in stored.items():
                name, offset, kind = key_parts(key)
                if kind == "param":
                    pieces[name].append((offset, tensor))
    except (OSError, Unusable) as error:
        raise InputError(f"{error}: take another checkpoint") from error
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


def _text(place: Place, step: int) -> str:
    with place.read(step, MANIFEST) as file:
        return file.read().decode(errors="replace")


def _require_same(stored: Mapping[str, Any], present: Mapping[str, Any], where: str) -> None:
    present = json.loads(json.dumps(present))
    for name in sorted({*stored, *present}):
        if stored.get(name) != present.get(name):
            raise InputError(
                f"{where} was saved with {name} = {json.dumps(stored.get(name))}, which is "
                f"{json.dumps(present.get(name))} now: set it back, or train in another place"
            )


def _checked(
    place: Place, peers: Peers, step: int, manifest: Manifest, fragments: Sequence[StateFragment]
) -> list[Piece]:
    """Pieces of all shards, when they are as they were written and what all ranks need.

    Raises:
        Unusable: they are not; the same on every rank.
    """
    found = peers.together(lambda: _share_of_check(place, peers, step, manifest))
    faults = [fault for _, fault in found if fault is not None]
    if faults:
        raise Unusable(faults[0])
    pieces = [piece for share, _ in found for piece in share]
    where = place.full_name(step, MANIFEST).removesuffix(f"/{MANIFEST}")
    wanted: dict[tuple[str, str], int] = defaultdict(int)
    for ends in peers.gather(_ends(fragments)):
        for held, end in ends.items():
            wanted[held] = max(wanted[held], end)
    reason = difference(sizes_of(pieces, where), wanted)
    if reason is not None:
        raise Unusable(f"{where} {reason}")
    return pieces


def _share_of_check(
    place: Place, peers: Peers, step: int, manifest: Manifest
) -> tuple[list[Piece], str | None]:
    """Pieces of the shards that fall to this rank, or what is wrong with one of them."""
    pieces = []
    try:
        for number in range(peers.rank, len(manifest.shards), peers.count):
            shard = manifest.shards[number]
            where = place.full_name(step, shard.name)
            try:
                with place.read(step, shard.name) as file:
                    pieces += checked_pieces(file, shard, number, where)
            except FileNotFoundError:
                raise Unusable(f"{where} is missing") from None
    except Unusable as fault:
        return [], str(fault)
    return pieces, None


def _ends(fragments: Sequence[StateFragment]) -> dict[tuple[str, str], int]:
    """Where the last fragment of each (parameter, kind) ends."""
    ends: dict[tuple[str, str], int] = defaultdict(int)
    for fragment in fragments:
        for kind, tensor in fragment.tensors.items():
            held = (fragment.name, kind)
            ends[held] = max(ends[held], fragment.offset + tensor.numel())
    return dict(ends)


def _fill(
    fragments: Sequence[StateFragment],
    place: Place,
    step: int,
    manifest: Manifest,
    pieces: Iterable[Piece],
) -> None:
    """Read this rank's fragments, shard by shard and from front to back, a slab at a time."""
    index: dict[tuple[str, str], list[Piece]] = defaultdict(list)
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
        with place.read(step, manifest.shards[shard].name) as file:
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
