"""The files of shards, in a folder or at any URL that fsspec knows (s3://, gs://, hf://, https://),
fetched ahead into a bounded folder.

A fetched shard is named after its sha256 and appears by rename, so a killed run's files are used
again and several processes may share one folder; each clears away what it brought or took over.
"""

import errno
import hashlib
import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from evaclip_model.errors import InputError
from evaclip_model.files import replace_file
from evaclip_model.reading.samples import SampleReader, Shard, read_tombstones
from evaclip_model.reading.urls import is_url, open_binary, open_filesystem, resolve_location

FETCHES_AT_ONCE = 4
ATTEMPTS = 6
FIRST_PAUSE_S = 1.0
"""Before the second attempt; doubled for each further one."""
_CHUNK = 4 * 2**20


class ShardStore:
    """The shards of a manifest: those on this machine are read where they lie, those at URLs are
    fetched into a folder that holds no more than it may.

    Room is made by the shard that was asked for the longest time ago. One that is asked for now is
    always fetched, even when it alone is larger than the folder may be.
    """

    def __init__(
        self, folder: str, cache: Path | None, cache_bytes: int, *, rank: int = 0, ranks: int = 1
    ) -> None:
        """Take over this process's part of what a killed run left in `cache`, which there must be
        if any shard lies at a URL. `folder` is the manifest's, a path or a URL."""
        self.folder = folder.rstrip("/")
        if is_url(folder):
            open_filesystem(folder)
        self._is_local, self._cache = cache is None, cache or Path()
        self._limit = cache_bytes
        self._held: dict[str, tuple[int, Future[Path]]] = {}
        self._used: set[str] = set()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._fetchers = ThreadPoolExecutor(FETCHES_AT_ONCE, thread_name_prefix="shards")
        if cache is None:
            return
        cache.mkdir(parents=True, exist_ok=True)
        _clear_unfinished(cache)
        for left in sorted(cache.glob("*.tar"))[rank::ranks]:
            found: Future[Path] = Future()
            found.set_result(left)
            with suppress(FileNotFoundError):
                self._held[left.stem] = (left.stat().st_size, found)
                self._used.add(left.stem)

    def open_shard(self, shard: Shard) -> SampleReader:
        """Open the shard, once it is there, to read its samples that count; raises InputError."""
        location = resolve_location(self.folder, shard.path)
        if not is_url(location):
            return _open_local(Path(location), shard, read_tombstones(self.folder, shard))
        for _ in range(ATTEMPTS):
            try:
                path = self._request_shard(shard, must=True).result()
                return SampleReader(path, read_tombstones(self.folder, shard))
            except FileNotFoundError:  # another process took it over, and cleared it away
                with self._lock:
                    self._held.pop(shard.sha256, None)
        raise InputError(
            f"{location} is cleared away as soon as it is fetched: give the shards' cache more room"
        )

    def announce_shards(self, shards: Iterable[Shard]) -> None:
        """Say which shards come next, so that they may be brought; never waits."""
        for shard in () if self._is_local else shards:
            is_remote = is_url(resolve_location(self.folder, shard.path))
            if is_remote and self._request_shard(shard, must=False) is None:
                return

    def close(self) -> None:
        """Clear away what was brought."""
        self._closing.set()
        self._fetchers.shutdown(cancel_futures=True)
        for key in self._held:
            (self._cache / f"{key}.tar").unlink(missing_ok=True)

    def _request_shard(self, shard: Shard, *, must: bool) -> Any:
        """The shard's file to come; None when there is no room and `must` is not set."""
        with self._lock:
            held = self._held.pop(shard.sha256, None)
            if held is None:
                if not self._make_room(shard.bytes, must) and not must:
                    return None
                held = (shard.bytes, self._fetchers.submit(self._fetch_shard, shard))
            self._held[shard.sha256] = held  # the newest is the last
            if must:
                self._used.add(shard.sha256)
            return held[1]

    def _make_room(self, needed: int, must: bool) -> bool:
        """Clear away what was used longest ago; what is still to be used, only if it must be."""
        used = sum(size for size, _ in self._held.values())
        for key in sorted(self._held, key=lambda key: key not in self._used):
            size, fetched = self._held[key]
            if used + needed <= self._limit or not (must or key in self._used):
                break
            if fetched.done():
                # A file that is being read stays readable: only its name goes.
                (self._cache / f"{key}.tar").unlink(missing_ok=True)
                del self._held[key]
                self._used.discard(key)
                used -= size
        return used + needed <= self._limit

    def _fetch_shard(self, shard: Shard) -> Path:
        path = self._cache / f"{shard.sha256}.tar"
        url = resolve_location(self.folder, shard.path)
        problem = "the run ended"
        for attempt in range(ATTEMPTS):
            if path.exists():
                return path
            pause_s = FIRST_PAUSE_S * 2 ** (attempt - 1) if attempt else 0.0
            if self._closing.wait(pause_s):
                break
            try:
                _fetch_once(url, shard, path)
                return path
            except FileNotFoundError:
                raise InputError(f"{url} does not exist: verify the shards again") from None
            except Exception as error:  # every protocol has its own kinds
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                problem = str(error) or type(error).__name__
        raise InputError(f"{url} could not be fetched in {ATTEMPTS} attempts: {problem}")


def _fetch_once(url: str, shard: Shard, path: Path) -> None:
    digest = hashlib.sha256()
    with replace_file(path, sync=False) as beside:
        with open_binary(url) as remote, beside.open("wb") as local:
            while chunk := remote.read(_CHUNK):
                digest.update(chunk)
                local.write(chunk)
        if digest.hexdigest() != shard.sha256:
            size = beside.stat().st_size
            raise ValueError(f"{size} bytes came that are not the {shard.bytes} of the manifest")


def _open_local(path: Path, shard: Shard, left_out: frozenset[int]) -> SampleReader:
    try:
        size = path.stat().st_size
        if size == shard.bytes:
            return SampleReader(path, left_out)
    except OSError as error:
        raise InputError(f"{path} cannot be opened ({error}): verify the shards again") from None
    raise InputError(
        f"{path} changed since it was verified: it has {size:,} bytes, not "
        f"{shard.bytes:,}: verify the shards again"
    )


def _clear_unfinished(cache: Path) -> None:
    """Remove what processes that are gone were fetching."""
    for part in cache.glob(".*.tar.*"):
        try:
            os.kill(int(part.suffix[1:]), 0)
        except ProcessLookupError:
            part.unlink(missing_ok=True)
        except (ValueError, PermissionError):
            continue
