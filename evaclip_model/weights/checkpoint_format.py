"""The files of a training checkpoint: the manifest, shards (safetensors files of flat fp32 pieces),
checksums, and the check that they belong together. Who writes and restores them:
training/checkpoint/. There is no state of random generators in it: all that is random in training
depends on the seed and a sample's position."""

import json
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import torch
from torch import Tensor

from evaclip_model.errors import InputError
from evaclip_model.weights.tensor_files import SLAB_BYTES, StoredTensor, read_safetensors

MANIFEST = "manifest.json"
VERSION = 2
"""Of the form; a manifest without one is of the first."""


class UnusableCheckpoint(ValueError):
    """A checkpoint is not whole; the text says which file and why."""


@dataclass(frozen=True)
class TrainingProgress:
    """Progress of training: everything besides tensors that the next step depends on."""

    step: int
    """Optimizer steps done (batches consumed, those skipped for overflow included)."""
    counters: dict[str, Any]
    """The engine's."""
    bad_samples: dict[str, int]
    """Reason -> samples that could not be used, over all ranks."""
    seconds: float
    settings: dict[str, Any]
    """`settings_of` the run: the state belongs to these and to no others."""
    samples: int = 0
    """Image-text pairs seen."""
    loop: dict[str, Any] = field(default_factory=dict)
    """The training loop's: where its data stands, and what its guards have seen (JSON)."""


class ShardFile(NamedTuple):
    """A file as the manifest knows it."""

    name: str
    bytes: int
    crc32: int
    """zlib's, of the whole file."""


@dataclass(frozen=True)
class CheckpointManifest:
    """The content of `manifest.json`; `shards` are one of each rank that wrote, in their order."""

    shards: tuple[ShardFile, ...]
    progress: TrainingProgress

    def to_text(self) -> str:
        content = {
            "version": VERSION,
            "shards": [shard._asdict() for shard in self.shards],
            "progress": asdict(self.progress),
        }
        return json.dumps({**content, "crc32": _crc_of(content)})

    @classmethod
    def from_text(cls, text: str, where: str) -> Self:
        """Raises UnusableCheckpoint: altered, cut off, or of the first form; InputError: of a form
        that this version does not know yet."""
        try:
            content = json.loads(text)
            version = content.get("version", 1)
            if version > VERSION:
                raise InputError(
                    f"{where} is of form {version}, and this version knows forms up to {VERSION}: "
                    "continue with the version that wrote it, or a newer one"
                )
            if version < VERSION:
                raise UnusableCheckpoint(f"{where} was written by an earlier version")
            if content.pop("crc32") != _crc_of(content):
                raise UnusableCheckpoint(f"{where} was altered after it was written")
            known = {field.name for field in fields(TrainingProgress)}
            progress = {k: v for k, v in content["progress"].items() if k in known}
            shards = tuple(ShardFile(**shard) for shard in content["shards"])
            return cls(shards, TrainingProgress(**progress))
        except (InputError, UnusableCheckpoint):
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnusableCheckpoint(f"{where} is cut off or no manifest") from error


class StoredPiece(NamedTuple):
    """A run of one parameter's values, and where it lies."""

    name: str
    kind: str
    """`param`, `exp_avg` …: as in StateFragment."""
    offset: int
    """First element inside the flattened parameter."""
    size: int
    """Elements."""
    shard: int
    place: int
    """First byte in the shard."""

    @property
    def end(self) -> int:
        return self.offset + self.size


def key_of(name: str, offset: int, kind: str) -> str:
    """The name of a piece in its shard."""
    return f"{name}@{offset}#{kind}"


def write_shard(file: BinaryIO, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Write `tensors` ([n] fp32 on the CPU, by `key_of`) as a safetensors file, of which this
    returns bytes and crc32. Neither copies them nor holds Python's lock while it writes and sums,
    so a training step may run beside it."""
    entries, end = {}, 0
    for key, tensor in tensors.items():
        if tensor.dtype != torch.float32 or tensor.dim() != 1 or not tensor.is_contiguous():
            raise TypeError(f"'{key}' is not a contiguous [n] fp32 tensor")
        begin, end = end, end + tensor.nbytes
        entries[key] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    size, crc = 0, 0
    for part in chain((struct.pack("<Q", len(text)), text), _iterate_slabs(tensors.values())):
        file.write(part)
        size, crc = size + len(part), zlib.crc32(part, crc)
    return size, crc


def checked_pieces(file: BinaryIO, shard: ShardFile, number: int, where: str) -> list[StoredPiece]:
    """Read a whole shard once: what is in it; raises UnusableCheckpoint if it was altered."""
    size, crc, start = 0, 0, b""
    while data := file.read(SLAB_BYTES):
        start = start or data
        size, crc = size + len(data), zlib.crc32(data, crc)
    if size != shard.bytes:
        raise UnusableCheckpoint(f"{where} has {size:,} bytes where {shard.bytes:,} were written")
    if crc != shard.crc32:
        raise UnusableCheckpoint(f"{where} was altered after it was written: its checksum differs")
    (length,) = struct.unpack("<Q", start[:8])
    if 8 + length > len(start):
        file.seek(0)
        start = file.read(8 + length)
    header = json.loads(start[8 : 8 + length])
    pieces = []
    for key, entry in header.items():
        if key != "__metadata__":
            (size,), place = entry["shape"], 8 + length + entry["data_offsets"][0]
            name, offset, kind = key_parts(key)
            pieces.append(StoredPiece(name, kind, offset, size, number, place))
    return pieces


def key_parts(key: str) -> tuple[str, int, str]:
    """Name, offset and kind of `key_of`."""
    place, _, kind = key.rpartition("#")
    name, _, offset = place.rpartition("@")
    return name, int(offset), kind


def sizes_of(pieces: Iterable[StoredPiece], where: str) -> dict[tuple[str, str], int]:
    """Elements of each (parameter, kind); raises UnusableCheckpoint: overlaps or gaps."""
    ends: dict[tuple[str, str], int] = {}
    for piece in sorted(pieces, key=lambda piece: (piece.name, piece.kind, piece.offset)):
        held = (piece.name, piece.kind)
        if piece.offset != ends.get(held, 0):
            raise UnusableCheckpoint(f"{where} lacks elements of '{piece.name}' ({piece.kind})")
        ends[held] = piece.end
    return ends


def describe_difference(
    stored: Mapping[tuple[str, str], int], wanted: Mapping[tuple[str, str], int]
) -> str | None:
    """Return why stored sizes are not those that training needs; none when they are."""
    for (name, kind), size in sorted(wanted.items()):
        held = stored.get((name, kind))
        if held is None:
            return f"holds no '{name}' ({kind})"
        if held != size:
            return f"holds {held:,} elements of '{name}' ({kind}) where the model has {size:,}"
    if beyond := sorted(set(stored) - set(wanted)):
        return f"holds '{beyond[0][0]}' ({beyond[0][1]}), which is not trained now"
    return None


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor [...] on the CPU, to read or to fill."""
    return tensor.detach().view(torch.uint8).numpy().data


def _iterate_slabs(tensors: Iterable[Tensor]) -> Iterator[bytes | memoryview]:
    for tensor in tensors:
        data = bytes_of(tensor)
        for done in range(0, len(data), SLAB_BYTES):
            yield data[done : done + SLAB_BYTES]


def _crc_of(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step that a folder's name tells; none when it is not a checkpoint's."""
    digits = name.removeprefix("step-")
    return int(digits) if digits != name and digits.isdecimal() else None


def list_retired(steps: Sequence[int], newest: int, keep: int, keep_every: int | None) -> list[int]:
    """Checkpoints that go once `newest` is whole: the older ones beyond `keep`, and later ones,
    which were spoilt or belong to a course that was left. Multiples of `keep_every` stay."""
    older = sorted((step for step in steps if step <= newest), reverse=True)[keep:]
    passing = [step for step in older if keep_every is None or step % keep_every]
    return passing + [step for step in steps if step > newest]


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in a folder, newest first."""
    found = [step_of(path.parent.name) for path in folder.glob(f"step-*/{MANIFEST}")]
    steps = sorted((step for step in found if step is not None), reverse=True)
    return [folder / step_name(step) for step in steps]


def stored_parameters(folder: Path) -> dict[str, StoredTensor]:
    """The parameters in a checkpoint, `folder/step-N`, by name, flat, [n] fp32; their values stay
    on disk. Raises InputError: a shard or a piece is missing, cut off or unreadable."""
    where = folder / MANIFEST
    pieces: dict[str, dict[int, StoredTensor]] = defaultdict(dict)
    try:
        manifest = CheckpointManifest.from_text(where.read_text(), str(where))
        for shard in manifest.shards:
            stored = read_safetensors(folder / shard.name)
            if (folder / shard.name).stat().st_size != shard.bytes:
                raise UnusableCheckpoint(f"{folder / shard.name} is not as long as it was written")
            for key, tensor in stored.items():
                name, offset, kind = key_parts(key)
                if kind == "param":
                    pieces[name][offset] = tensor
    except (OSError, UnusableCheckpoint) as error:
        raise InputError(f"{error}: take another checkpoint") from error
    return {name: _join_pieces(name, found, folder) for name, found in pieces.items()}


def _join_pieces(name: str, pieces: Mapping[int, StoredTensor], folder: Path) -> StoredTensor:
    end, ordered = 0, dict(sorted(pieces.items()))
    for offset, tensor in ordered.items():
        if offset != end:
            raise InputError(f"{folder} lacks a piece of '{name}': take another checkpoint")
        end += tensor.shape.numel()

    def values() -> Iterator[Tensor]:
        return chain.from_iterable(tensor.pieces() for tensor in ordered.values())

    return StoredTensor(torch.Size([end]), torch.float32, values)
