"""The sample format: what a shard holds, and the manifest that says which shards are whole. Imports
no torch.

A shard is a webdataset tar. A sample is members that share a key: an image (`KEY.jpg` or another of
`IMAGE_EXTENSIONS`), `KEY.txt` (the caption, UTF-8; or another of `CAPTION_EXTENSIONS`) and, where
whoever made the shard wrote one, `KEY.json` (the record: uid, source, url, sizes, ...). A sample
that lacks something is flawed and costs itself, not its shard.

Further captions (recaptions, other languages) lie apart from the tar, in a file of gzipped JSON
Lines, one sample a line: `["KEY", {"NAME": ["CAPTION", ...], ...}]`.
"""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from enum import StrEnum
from functools import partial
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self, TypeVar

from pydantic import ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass

from evaclip_model.config import Config
from evaclip_model.errors import InputError
from evaclip_model.files import write_atomically
from evaclip_model.reading.tar_file import STRETCH, BrokenTar, Member, TarReader
from evaclip_model.reading.urls import (
    is_url,
    open_binary,
    open_filesystem,
    read_range,
    read_text,
    resolve_location,
)

STORED = "stored"
"""Name of the caption that lies beside the image, among `caption_weights`."""
Captions = Mapping[str, Sequence[str]]
"""Name -> a sample's captions of that name."""
_STREAM = 2
"""Sets these draws apart from those of the order."""
SHARDS = "shards.json"
"""Name of the manifest, in the folder that its shards' paths are relative to."""
VALIDATION_SHARDS = "validation.json"
"""Beside it, of the pairs that are held out."""
TOMBSTONES = "tombstones.bin"
"""Beside both: which samples of their shards nobody may read, a part a shard."""
MAX_SAMPLES = 1 << 24
"""Of a shard whose tombstones are read."""
IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "jpe", "jfif"),
    *("png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "avif"),
)
"""What may name a sample's image; what the image is, its bytes decide."""
CAPTION_EXTENSIONS = ("txt", "text", "caption")
"""What may name its caption; of several the first of these counts, and no record's."""
RECORD_EXTENSION = "json"
MAX_IMAGE_BYTES = 1 << 28
"""Larger members are not read into memory: the sample is flawed."""
MAX_TEXT_BYTES = 1 << 24
SHARD_SCHEMES = ("s3", "gs", "gcs", "az", "abfs", "abfss", "hf", "http", "https")
Stored = tuple[str, dict[str, Member]]
"""Key of a sample, and its members by extension: all behind the first dot, in lower case."""
T = TypeVar("T")
_META = re.compile(r"__[^/]*__($|/)").match
"""Names that webdataset passes over: notes about the shard, not parts of a sample."""
_FINDER = re.compile(r"(^|/)(\._|__MACOSX/|\.DS_Store$)").search
"""Files that macOS puts into tars beside everybody's own."""
_NAME = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)").fullmatch
"""Key and extension: the file's name parts at its first dot; a key may not begin with one."""
_REPEATED = "__repeated__"
"""Stands among a sample's members for further ones of an extension that it has already."""


class BrokenShard(ValueError):
    """A shard that does not hold what the format promises; the message says where and what."""


def number_bytes(data: bytes | memoryview) -> int:
    """64 bits of a hash, signed; two of 131,072 unequal ones are equal once in a billion times."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


class MemberFlaw(StrEnum):
    """A flaw of a sample's members, found before anybody decodes its image."""

    NO_IMAGE = "no_image"
    SEVERAL_IMAGES = "several_images"
    NO_CAPTION = "no_caption"
    REPEATED_MEMBER = "repeated_member"
    TOO_LARGE = "too_large"
    CAPTION_NOT_UTF8 = "caption_not_utf8"
    UNREADABLE_RECORD = "unreadable_record"


class Sample(NamedTuple):
    """One image-text pair as stored."""

    key: str
    image: bytes | memoryview
    """Encoded; empty where `flaw` says that there is none."""
    caption: str
    record: Mapping[str, Any]
    """What the shard says of the sample besides, empty where it says nothing or was not asked."""
    flaw: MemberFlaw | None = None


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class Shard:
    """One whole, verified webdataset tar. A rank holds hundreds of thousands of them: half as large
    as pydantic's models."""

    path: str
    """Relative to the manifest's folder, with forward slashes; or a URL of `SHARD_SCHEMES`."""
    source: str
    """The one collection that all its samples come from."""
    samples: int = Field(ge=1)
    """Those of the tar, less its tombstones."""
    bytes: int = Field(ge=1)
    """Size of the tar."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    tombstones_at: tuple[int, int] | None = None
    """Offset and length in bytes of its part of `TOMBSTONES`; None: all its samples count."""
    tombstones: str = Field(default="", pattern=r"^(\d+( \d+)*)?$")
    """The same as numbers between spaces, as manifests had it before there was that file."""
    captions: str = ""
    """Path of a file of further captions, as `path` is; empty: there are none."""

    @field_validator("path")
    @classmethod
    def _is_a_plain_file(cls, path: str) -> str:
        # webdataset would run a path such as "pipe:..." in a shell
        is_stored = is_url(path) and path.partition("://")[0] in SHARD_SCHEMES
        is_relative = not path.startswith("/") and ":" not in path.partition("/")[0]
        if path.lower().endswith(".tar") and (is_stored or is_relative):
            return path
        raise ValueError(
            "should be the path of a .tar, relative to the manifest's folder, or a URL "
            f"({', '.join(SHARD_SCHEMES)})"
        )


class ShardManifest(Config):
    """Every shard that training may read, in a fixed order."""

    shards: tuple[Shard, ...] = Field(min_length=1)
    """Ordered by path; the order is part of what makes training repeatable."""

    def by_source(self) -> dict[str, tuple[Shard, ...]]:
        """Shards of every source, sources in the order of their names."""
        by_name = attrgetter("source")
        found = groupby(sorted(self.shards, key=by_name), by_name)
        return {source: tuple(shards) for source, shards in found}

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """Read a manifest from its file, on this machine or at a URL; raises InputError."""
        try:
            values = json.loads(read_text(path))
        except FileNotFoundError:
            raise InputError(f"{path} does not exist: verify the shards to make it") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read as a shard manifest ({error})") from None
        return cls.from_mapping(values, where=str(path))

    def write(self, path: Path) -> None:
        """Write the manifest, never seen half-written."""
        values = self.model_dump(mode="json", exclude_defaults=True)
        write_atomically(path, json.dumps(values, indent=1) + "\n")


def append_tombstones(bits: bytes, file: BinaryIO) -> tuple[int, int]:
    """Write a shard's part at the end of `TOMBSTONES`: a bit a sample, the lowest first, set where
    nobody may read it; returns its `Shard.tombstones_at`."""
    return file.tell(), file.write(zlib.compress(bits))


def read_tombstones(folder: str, shard: Shard) -> frozenset[int]:
    """Places of a shard's samples that do not count, from 0; `folder`, a path or a URL, is that of
    its manifest. Raises InputError."""
    if shard.tombstones_at is None:
        return frozenset(map(int, shard.tombstones.split()))
    location = resolve_location(folder, TOMBSTONES)
    try:
        inflate = zlib.decompressobj()
        bits = inflate.decompress(read_range(location, *shard.tombstones_at), MAX_SAMPLES // 8)
        if not inflate.eof:
            raise EOFError(f"no whole part of {shard.path}")
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{location} cannot be read as tombstones ({error}): make the dataset again"
        ) from None
    return frozenset(
        8 * at + bit for at, byte in enumerate(bits) if byte for bit in range(8) if byte >> bit & 1
    )


def read_samples(shard: Path) -> Iterator[Sample]:
    """Yield all samples of a shard in stored order, flawed ones too, one image in memory at a time;
    raises BrokenShard."""
    try:
        with shard.open("rb", buffering=0) as tar:
            for key, found in group_members(TarReader(tar.fileno())):
                yield _read_sample(key, found, tar.fileno())
    except (BrokenTar, OSError) as error:
        raise BrokenShard(f"{shard} is not a whole tar: {error}") from error


class SampleReader:
    """Images and captions of a shard, without records, read once, front to back, in parts."""

    def __init__(self, shard: Path, left_out: Set[int] = frozenset()) -> None:
        """Open the shard, whose samples at the places `left_out` do not count; raises OSError."""
        self._shard = shard
        self._tar = shard.open("rb", buffering=0)
        self._members = TarReader(self._tar.fileno())
        self._samples = skip_tombstones(group_members(self._members), left_out)
        self.next = 0
        """Place of the sample that is read next, among those that count, in stored order."""

    def read(self, start: int, stop: int) -> list[Sample]:
        """The samples `start` to `stop` (exclusive), fewer when the shard ends before; nothing is
        read of what lies before `start`, which must not be behind `next`. Raises BrokenShard."""
        try:
            self._members.stretch_bytes = 0
            skipped = sum(1 for _ in islice(self._samples, start - self.next))
            self._members.stretch_bytes = STRETCH
            taken = [
                _read_sample(key, found, self._tar.fileno(), has_record=False)
                for key, found in islice(self._samples, stop - start)
            ]
        except (BrokenTar, OSError) as error:
            raise BrokenShard(f"{self._shard} is not a whole tar: {error}") from error
        self.next += skipped + len(taken)
        return taken

    def close(self) -> None:
        """Close the file; what was read stays."""
        self._tar.close()


def group_members(found: Iterable[Member]) -> Iterator[Stored]:
    """(key, extension -> member) of neighbours that share a key, as webdataset groups them, whose
    import would import torch. Of two members with the same name the first counts and the sample is
    flawed; what macOS adds (`is_sample_file`) is passed over."""
    key, parts = "", dict[str, Member]()
    for member in found:
        named = _NAME(member.name) if is_sample_file(member.name) else None
        if named is None:
            continue
        if parts and named[1] != key:
            yield key, parts
            parts = {}
        key, extension = named[1], named[2].lower()
        if extension in parts or extension in ("__key__", "__url__"):  # webdataset adds these
            extension = _REPEATED
        parts[extension] = member
    if parts:
        yield key, parts


def is_sample_file(name: str) -> bool:
    """Return whether a member may be part of a sample; webdataset takes this as `select_files`."""
    return not (_META(name) or _FINDER(name))


def open_webdataset(manifest: Path | str, *, resampled: bool = False) -> Any:
    """A dataset version as plain webdataset reads it, without what it leaves out: its pipeline,
    from which `.shuffle(1000).decode("pil").to_tuple("jpg;png;webp", "txt")` and the rest go on.
    Shards are shared among ranks and DataLoader workers by webdataset's rules. Where the version
    has further captions, every sample has them as `captions.json`, name -> captions, empty where it
    has none.

    Args:
        manifest: `shards.json` of the dataset, a path or a URL that fsspec knows.
        resampled: draw shards with replacement, without end.

    Raises InputError; while reading, also for a shard that is gone or changed since verified.
    """
    import webdataset  # imports torch, which few who look into shards need
    from webdataset.compat import FluidInterface

    folder = str(manifest).rpartition("/")[0]
    found = ShardManifest.read(manifest).shards
    shards = {resolve_location(folder, shard.path): shard for shard in found}
    kind = webdataset.ResampledShards if resampled else webdataset.SimpleShardList
    pipeline = type("ShardPipeline", (webdataset.DataPipeline, FluidInterface), {})
    splits = () if resampled else (webdataset.split_by_node, webdataset.split_by_worker)
    return pipeline(kind(list(shards)), *splits, partial(_read_webdataset, folder, shards))


def _read_webdataset(
    folder: str, shards: Mapping[str, Shard], asked: Iterable[dict[str, str]]
) -> Iterator[dict[str, Any]]:
    """The samples of the shards that are `asked` for; each tar is counted from its own start."""
    from webdataset.handlers import ignore_and_continue
    from webdataset.tariterators import group_by_keys, tar_file_expander

    has_captions = any(shard.captions for shard in shards.values())
    for url in (one["url"] for one in asked):
        shard = shards[url]
        place = resolve_location(folder, shard.captions)
        further = read_captions(place) if shard.captions else {}
        try:
            size = open_filesystem(url).size(url) if is_url(url) else Path(url).stat().st_size
            if size != shard.bytes:
                raise InputError(f"{url} changed since it was verified: verify the shards again")
            with open_binary(url) as stream:
                tar = {"url": url, "stream": stream}
                members = tar_file_expander([tar], select_files=is_sample_file)
                # A repeated member is passed over: its sample is left out of the dataset.
                found = group_by_keys(members, handler=ignore_and_continue)
                for one in skip_tombstones(found, read_tombstones(folder, shard)):
                    if has_captions:
                        mine = further.get(one["__key__"], {})
                        one["captions.json"] = json.dumps(mine).encode()
                    yield one
        except OSError as error:
            raise InputError(f"{url} cannot be read ({error}): verify the shards again") from None


def skip_tombstones(samples: Iterable[T], left_out: Set[int]) -> Iterator[T]:
    """A shard's samples, read in stored order, without its tombstones."""
    return (one for place, one in enumerate(samples) if place not in left_out)


def _read_sample(
    key: str, found: Mapping[str, Member], tar: int, has_record: bool = True
) -> Sample:
    images = [found[extension] for extension in IMAGE_EXTENSIONS if extension in found]
    caption_member = next((found[name] for name in CAPTION_EXTENSIONS if name in found), None)
    flaw = None
    if _REPEATED in found:
        flaw = MemberFlaw.REPEATED_MEMBER
    elif not images:
        flaw = MemberFlaw.NO_IMAGE
    elif len(images) > 1:
        flaw = MemberFlaw.SEVERAL_IMAGES
    elif caption_member is None:
        flaw = MemberFlaw.NO_CAPTION
    image: bytes | memoryview = b""
    if len(images) == 1 and images[0].size <= MAX_IMAGE_BYTES:
        image = images[0].view_content(tar)
    elif len(images) == 1:
        flaw = flaw or MemberFlaw.TOO_LARGE
    caption = ""
    if caption_member is not None and caption_member.size <= MAX_TEXT_BYTES:
        try:
            caption = str(caption_member.view_content(tar), "utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError:
            flaw = flaw or MemberFlaw.CAPTION_NOT_UTF8
    elif caption_member is not None:
        flaw = flaw or MemberFlaw.TOO_LARGE
    record: Any = {}
    if has_record and (stored := found.get(RECORD_EXTENSION)) is not None:
        try:
            record = json.loads(stored.read(tar)) if stored.size <= MAX_TEXT_BYTES else None
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            record, flaw = {}, flaw or MemberFlaw.UNREADABLE_RECORD
    return Sample(key, image, caption, record, flaw)


def read_captions(location: str) -> dict[str, Captions]:
    """Key in the shard -> captions, of a file or URL that can be read (InputError if not)."""
    try:
        with open_binary(location) as raw, gzip.open(raw) as lines:
            return dict(map(json.loads, lines))
    except InputError:
        raise
    except (OSError, ValueError, TypeError, EOFError, zlib.error) as error:
        raise InputError(
            f"{location} cannot be read as captions ({error}): make the dataset again"
        ) from None


def write_captions(path: Path, samples: Iterable[tuple[str, Captions]]) -> None:
    """Write a file, the same bytes for the same captions."""
    lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    write_atomically(path, gzip.compress(lines.encode(), compresslevel=3, mtime=0))


def choose_caption(
    stored: str, further: Captions, weights: Mapping[str, float], *, seed: int, position: int
) -> str:
    """The caption that a sample is shown with at a position of the training stream.

    `weights` are shares of the draws by name (or `STORED`), in any scale; of a name with several
    captions any is drawn. Names that the sample lacks are passed over; where it has none of them,
    the stored caption is shown. The draw depends on `seed` and `position` alone.
    """
    there = {
        name: weight for name, weight in weights.items() if name == STORED or further.get(name)
    }
    if not there:
        return stored
    import numpy as np  # not where captions are read alone

    draw = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, position, _STREAM))))
    bounds = np.cumsum(list(there.values()))
    place = int(np.searchsorted(bounds, draw.random() * bounds[-1], side="right"))
    name = list(there)[min(place, len(there) - 1)]
    captions = [stored] if name == STORED else further[name]
    return captions[int(draw.integers(len(captions)))]
