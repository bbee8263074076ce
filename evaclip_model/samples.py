"""The sample format: what a shard holds, and the manifest that says which shards are whole.

Covers: names inside a shard, reading its samples, `shards.json`.
Not here: making shards, sampling them for training, decoding images; torch.

A shard is a webdataset tar. A sample is three members that share a key: `KEY.jpg` (or png, webp),
`KEY.txt` (the caption, UTF-8) and `KEY.json` (the record: uid, source, url, sizes, ...).
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator

from evaclip_model.config import Config
from evaclip_model.errors import InputError

SHARDS = "shards.json"
"""Name of the manifest, in the folder that its shards' paths are relative to."""
IMAGE_EXTENSIONS = ("jpg", "png", "webp")
CAPTION_EXTENSION = "txt"
RECORD_EXTENSION = "json"


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
    """Number of samples in the tar."""
    bytes: int = Field(ge=1)
    """Size of the tar."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Of the tar's bytes."""

    @field_validator("path")
    @classmethod
    def _is_a_plain_file(cls, path: str) -> str:
        # webdataset would run a path such as "pipe:..." in a shell, and fetch a URL
        if not path.endswith(".tar") or ":" in path or path.startswith("/"):
            raise ValueError("should be the path of a .tar, relative to the manifest's folder")
        return path


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
    def read(cls, path: Path) -> Self:
        """Read a manifest from its file.

        Raises:
            InputError: no such file, or not a manifest.
        """
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            raise InputError(f"{path} does not exist: verify the shards to make it") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read as a shard manifest ({error})") from None
        if not isinstance(values, dict):
            raise InputError(f"{path} should hold a JSON object with the key 'shards'")
        return cls.from_mapping(values, where=str(path))

    def write(self, path: Path) -> None:
        """Write the manifest beside its place and rename it."""
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        with beside.open("w") as file:
            file.write(json.dumps(self.model_dump(mode="json"), indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)


def read_samples(shard: Path) -> Iterator[Sample]:
    """Yield the samples of a shard in stored order, holding one image in memory at a time.

    Raises:
        BrokenShard: truncated or unreadable tar, or a sample that lacks a member.
    """
    try:
        with tarfile.open(shard, "r:") as tar:
            for key, members in groupby(_members(tar), key=lambda member: member[0]):
                yield _sample(shard, key, {extension: data for _, extension, data in members})
    except (tarfile.TarError, OSError, EOFError) as error:
        raise BrokenShard(f"{shard} is no whole tar: {error}") from error


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, bytes]]:
    """(key, extension, content) of every regular file of an open tar."""
    for member in tar:
        file = tar.extractfile(member) if member.isfile() else None
        if file is None:
            continue
        folder, _, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        yield f"{folder}/{stem}" if folder else stem, extension.lower(), file.read()


def _sample(shard: Path, key: str, members: dict[str, bytes]) -> Sample:
    images = [extension for extension in IMAGE_EXTENSIONS if extension in members]
    if len(images) != 1 or not {CAPTION_EXTENSION, RECORD_EXTENSION} <= members.keys():
        raise BrokenShard(f"{shard}: sample {key} holds {sorted(members)}, not image, txt and json")
    try:
        caption = members[CAPTION_EXTENSION].decode()
        record = json.loads(members[RECORD_EXTENSION])
    except ValueError as error:
        raise BrokenShard(f"{shard}: sample {key} cannot be read ({error})") from error
    if not isinstance(record, dict) or not {"uid", "source"} <= record.keys():
        raise BrokenShard(f"{shard}: the record of sample {key} lacks uid or source")
    return Sample(key, members[images[0]], images[0], caption, record)
