"""The sample format: what a shard holds, and the manifest that says which shards are whole.

Covers: names inside a shard, reading its samples, `shards.json`.
Not here: making shards, sampling them for training, decoding images; torch.

A shard is a webdataset tar. A sample is three members that share a key: `KEY.jpg` (or png, webp),
`KEY.txt` (the caption, UTF-8) and `KEY.json` (the record: uid, source, url, sizes, ...).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from pydantic import Field, field_validator

from evaclip_model.config import Config
from evaclip_model.cpu.buffer_pool import Memory
from evaclip_model.errors import InputError
from evaclip_model.files import write_atomically
from evaclip_model.reading.tar_file import STRETCH, BrokenTar, Member, TarReader
from evaclip_model.reading.urls import read_text

SHARDS = "shards.json"
"""Name of the manifest, in the folder that its shards' paths are relative to."""
IMAGE_EXTENSIONS = ("jpg", "png", "webp")
CAPTION_EXTENSION = "txt"
RECORD_EXTENSION = "json"
Stored = tuple[str, dict[str, Member]]
"""Key of a sample, and its members by extension: all behind the first dot, in lower case."""
T = TypeVar("T")
_META = re.compile(r"__[^/]*__($|/)").match
"""Names that webdataset passes over: notes about the shard, not parts of a sample."""
_NAME = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)").fullmatch
"""Key and extension: the file's name parts at its first dot; a key may not begin with one."""
_TAKEN = ("__key__", "__url__")
"""What webdataset adds to a sample's extensions."""


class BrokenShard(ValueError):
    """A shard that does not hold what the format promises; the message says where and what."""


@dataclass(frozen=True)
class Sample:
    """One image-text pair as stored."""

    key: str
    """Unique inside its shard."""
    image: bytes
    """Encoded as `extension` says."""
    extension: str
    caption: str
    record: dict[str, Any]
    """At least `uid` (never changes, unique over all shards) and `source`."""


class Shard(Config):
    """One whole, verified webdataset tar."""

    path: str
    """Relative to the manifest's folder, with forward slashes."""
    source: str
    """The one metadata collection that all its samples come from."""
    samples: int = Field(ge=1)
    """Number of samples to train on: those of the tar, less its tombstones."""
    bytes: int = Field(ge=1)
    """Size of the tar."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Of the tar's bytes."""
    tombstones: str = Field(default="", pattern=r"^(\d+( \d+)*)?$")
    """Places of the tar's samples that nobody may read, counted from 0, separated by spaces.

    Text, because two billion samples have millions of them and few are needed at once.
    """

    @field_validator("path")
    @classmethod
    def _is_a_plain_file(cls, path: str) -> str:
        # webdataset would run a path such as "pipe:..." in a shell, and fetch a URL
        if not path.endswith(".tar") or ":" in path or path.startswith("/"):
            raise ValueError("should be the path of a .tar, relative to the manifest's folder")
        return path

    @property
    def left_out(self) -> frozenset[int]:
        """The tombstones as numbers."""
        return frozenset(map(int, self.tombstones.split()))


class ShardManifest(Config):
    """Every shard that training may read, in a fixed order."""

    shards: tuple[Shard, ...] = Field(min_length=1)
    """Ordered by path; the order is part of what makes training repeatable."""

    def by_source(self) -> dict[str, tuple[Shard, ...]]:
        """Shards of every source, sources in the order of their names."""
        sources = sorted({shard.source for shard in self.shards})
        return {
            source: tuple(shard for shard in self.shards if shard.source == source)
            for source in sources
        }

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """Read a manifest from its file, on this machine or at a URL.

        Raises:
            InputError: no such file, or not a manifest.
        """
        try:
            values = json.loads(read_text(path))
        except FileNotFoundError:
            raise InputError(f"{path} does not exist: verify the shards to make it") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read as a shard manifest ({error})") from None
        if not isinstance(values, dict):
            raise InputError(f"{path} should hold a JSON object with the key 'shards'")
        return cls.from_mapping(values, where=str(path))

    def write(self, path: Path) -> None:
        """Write the manifest, never seen half-written."""
        write_atomically(path, json.dumps(self.model_dump(mode="json"), indent=1) + "\n")


def read_samples(shard: Path) -> Iterator[Sample]:
    """Yield all samples of a shard in stored order, holding one image in memory at a time.

    Raises:
        BrokenShard: truncated or unreadable tar, or a sample that lacks a member.
    """
    try:
        with shard.open("rb", buffering=0) as tar:
            for key, found in grouped(TarReader(tar.fileno())):
                yield _sample(shard, key, {e: m.read(tar.fileno()) for e, m in found.items()})
    except (BrokenTar, OSError) as error:
        raise BrokenShard(f"{shard} is no whole tar: {error}") from error


class Pair(NamedTuple):
    """What training needs of a sample."""

    image: bytes | memoryview
    """Encoded."""
    caption: str
    key: str
    """Unique inside its shard."""


class PairReader:
    """Images and captions of a shard, read once, front to back, in parts."""

    def __init__(
        self, shard: Path, left_out: Set[int] = frozenset(), memory: Memory | None = None
    ) -> None:
        """Open the shard.

        Args:
            shard: the tar.
            left_out: places of samples that do not count (`Shard.left_out`).
            memory: of stretches of `STRETCH` bytes, which several readers may share; its own by
                default.

        Raises:
            OSError: it cannot be opened.
        """
        self._shard = shard
        self._memory = memory or Memory(STRETCH)
        self._tar = shard.open("rb", buffering=0)
        self._members = TarReader(self._tar.fileno())
        self._samples = kept(grouped(self._members), left_out)
        self.next = 0
        """Place of the sample that is read next, among those that count, in stored order."""

    def read(self, start: int, stop: int) -> list[Pair]:
        """The samples `start` to `stop` (exclusive).

        Fewer when the shard ends before; nothing is read of what lies before `start`, which must
        not be behind `next`.

        Raises:
            BrokenShard: truncated or unreadable tar, or a sample without image or caption.
        """
        try:
            self._members.memory = None
            skipped = sum(1 for _ in islice(self._samples, start - self.next))
            self._members.memory = self._memory
            taken = [self._pair(key, found) for key, found in islice(self._samples, stop - start)]
        except (BrokenTar, OSError) as error:
            raise BrokenShard(f"{self._shard} is no whole tar: {error}") from error
        self.next += skipped + len(taken)
        return taken

    def close(self) -> None:
        """Close the file; what was read stays."""
        self._tar.close()

    def _pair(self, key: str, found: dict[str, Member]) -> Pair:
        image = found[_image_extension(self._shard, key, found)]
        tar = self._tar.fileno()
        try:
            caption = str(found[CAPTION_EXTENSION].look(tar), "utf-8")
            return Pair(image.look(tar), caption, key)
        except ValueError as error:
            raise BrokenShard(f"{self._shard}: sample {key} cannot be read ({error})") from error


def grouped(found: Iterable[Member]) -> Iterator[Stored]:
    """(key, extension -> member) of neighbours that share a key, as webdataset groups them.

    Its own functions are not called, because importing webdataset imports torch, which few who look
    into shards need.

    Raises:
        BrokenTar: two members of a sample have the same extension.
    """
    key, parts = "", dict[str, Member]()
    for member in found:
        named = None if _META(member.name) else _NAME(member.name)
        if named is None:
            continue
        if parts and named[1] != key:
            yield key, parts
            parts = {}
        key, extension = named[1], named[2].lower()
        if extension in parts or extension in _TAKEN:
            raise BrokenTar(f"two members have the same name ({member.name})")
        parts[extension] = member
    if parts:
        yield key, parts


def kept(samples: Iterable[T], left_out: Set[int]) -> Iterator[T]:
    """A shard's samples, read in stored order by whatever reads them, without its tombstones.

    Args:
        samples: of the whole shard: `webdataset.WebDataset(path, shardshuffle=False)`, say.
        left_out: `Shard.left_out`.
    """
    return (one for place, one in enumerate(samples) if place not in left_out)


def _image_extension(shard: Path, key: str, found: Mapping[str, object]) -> str:
    """The one image among a sample's members, which must hold a caption too."""
    images = [extension for extension in IMAGE_EXTENSIONS if extension in found]
    if len(images) != 1 or CAPTION_EXTENSION not in found:
        raise BrokenShard(f"{shard}: sample {key} holds {sorted(found)}, not image, txt and json")
    return images[0]


def _sample(shard: Path, key: str, content: dict[str, bytes]) -> Sample:
    extension = _image_extension(shard, key, content)
    if RECORD_EXTENSION not in content:
        raise BrokenShard(f"{shard}: sample {key} holds {sorted(content)}, not image, txt and json")
    try:
        caption = content[CAPTION_EXTENSION].decode()
        record = json.loads(content[RECORD_EXTENSION])
    except ValueError as error:
        raise BrokenShard(f"{shard}: sample {key} cannot be read ({error})") from error
    if not isinstance(record, dict) or not {"uid", "source"} <= record.keys():
        raise BrokenShard(f"{shard}: the record of sample {key} lacks uid or source")
    return Sample(key, content[extension], extension, caption, record)
