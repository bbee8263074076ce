"""Shards that lie where their owner put them: the list between the stages adopt and verify, what
tells that a shard is still the one that was listed, and fetching one that lies at a URL."""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

from pydantic import Field

from evaclip_model.config import Config
from evaclip_model.errors import InputError
from evaclip_model.files import write_atomically
from evaclip_model.reading.urls import is_url, locate_file, open_filesystem
from tasks.artifacts.artifact import DIGEST_CHARS

ADOPTED = "adopted.jsonl"
SAMPLED_BYTES = 1 << 16
"""Of either end of a shard: its first header has the time at which it was packed."""
LOOKED_AT_ONCE = 16
"""Shards, most of whose time is a server's or a disk's."""
REMOTE_MARKS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "blob_id", "md5")


class AdoptedShard(Config):
    """One shard, as it was when it was listed."""

    location: str
    """Absolute path or URL; of a shard that was packed, the path inside the adoption's folder."""
    name: str
    """Its path below the folder that the source names: the same wherever the source lies."""
    source: str
    size: int = Field(ge=0)
    """Bytes."""
    mark: str
    """What `sizes_and_marks` says of it."""


def write_adopted(shards: Iterable[AdoptedShard], folder: Path) -> None:
    """Write the list, in the order in which the shards will be numbered."""
    write_atomically(folder / ADOPTED, "".join(f"{one.model_dump_json()}\n" for one in shards))


def read_adopted(folder: Path) -> list[AdoptedShard]:
    """The list of a finished adoption; a packed shard's location is absolute."""
    path = folder / ADOPTED
    found = [json.loads(line) for line in path.read_text().split("\n") if line]
    for one in found:
        if not is_url(one["location"]):
            one["location"] = str(folder / one["location"])
    return [AdoptedShard.from_mapping(one, where=str(path)) for one in found]


def sizes_and_marks(locations: Sequence[str]) -> list[tuple[int, str] | None]:
    """Bytes of every shard, and what changes with its content (128 KiB of it, or what the server
    says); None for one that is not there or cannot be read."""
    with ThreadPoolExecutor(LOOKED_AT_ONCE) as pool:
        return list(pool.map(_size_and_mark, locations))


def _size_and_mark(location: str) -> tuple[int, str] | None:
    try:
        if is_url(location):
            information = open_filesystem(location).info(location)
            size = int(information["size"] or 0)
            marks = [str(information[name]) for name in REMOTE_MARKS if name in information]
            content = "\0".join((str(size), *marks)).encode()
        else:
            with Path(location).open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(0)
                content = str(size).encode() + file.read(SAMPLED_BYTES)
                file.seek(max(0, size - SAMPLED_BYTES))
                content += file.read(SAMPLED_BYTES)
    except Exception:  # every protocol has its own kinds
        return None
    return size, hashlib.sha256(content).hexdigest()[:DIGEST_CHARS]


@contextmanager
def on_this_machine(location: str, folder: Path, also: Sequence[str] = ()) -> Iterator[Path]:
    """A shard's file: where it lies, or what is fetched from its URL into `folder` and removed,
    with those beside it that have one of the endings `also` instead of `.tar`."""
    location = locate_file(location)
    if not is_url(location):
        yield Path(location)
        return
    beside = folder / f".fetched.{os.getpid()}.tar"
    with ExitStack() as stack:
        try:
            for end in (".tar", *also):
                file = beside.with_name(beside.name.removesuffix(".tar") + end)
                stack.callback(file.unlink, missing_ok=True)
                with nullcontext() if end == ".tar" else suppress(FileNotFoundError):
                    url = location.removesuffix(".tar") + end
                    open_filesystem(url).get_file(url, str(file))
        except Exception as error:  # every protocol has its own kinds
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InputError(f"{location} cannot be fetched ({error}): run again") from error
        yield beside
