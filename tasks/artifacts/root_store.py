"""A root at a URL: a store that keeps all artifacts, and a bounded working copy on this machine.

Stages work in the working copy as in any root. What they made is put into the store, the manifest
last; what a step reads is fetched from there, compared with the manifest. Manifests and small
reports are here from the beginning, so that whatever walks them sees the whole root; shards do not
stay: they are read at their URL. Everything here does nothing in a root that is a folder.

Not here: locks among machines (lease.py); where a path of a working copy leads
(evaclip_model/reading/urls.py); checkpoints.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Container, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

from evaclip_model.errors import InputError, shorten_error
from evaclip_model.files import lock_file, replace_file, write_atomically
from evaclip_model.reading.urls import WORKING_COPY, WorkingCopy, find_working_copy, open_filesystem
from tasks.progress import Report, report_nothing

MANIFEST = "manifest.json"
PRUNED = "pruned.json"
"""The manifest of an artifact whose files were removed: what it was made from stays known."""
ROOT_LOCK = ".flows.lock"
"""Under the root of all artifacts: held by every flow, and alone by whoever removes artifacts."""
BULK = "bulk.jsonl"
"""List of an artifact's bulk files: `{"path": ..., "size": ...}` a line."""
LOCK = ".lock"
"""In an artifact's folder, held by the process that makes it."""
SENT = ".sent.jsonl"
"""Files of an unfinished artifact that this working copy has put into the store."""
SMALL_BYTES = 8 << 20
"""Files right in an artifact's folder up to this size come with its manifest."""
AT_ONCE = 16
"""Requests, most of whose time is the store's."""
Paths = Sequence[Path]
FileState = tuple[int, int]
"""Bytes and time of change in ns, by which a file is known again."""
_DIGEST = re.compile(r"[0-9a-f]{16}")


def ask_root(url: str, question: str, *given: Any, **how: Any) -> Any:
    """Call a method of a store's filesystem; raises FileNotFoundError and a full disk as they are,
    all else as one sentence."""
    if url.startswith("file://"):  # of all stores only this one has folders
        Path(url.removeprefix("file://")).parent.mkdir(parents=True, exist_ok=True)
    try:
        return getattr(open_filesystem(url), question)(*given or (url,), **how)
    except FileNotFoundError:
        raise
    except Exception as error:  # every protocol has its own kinds
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"{url}: the store of EVACLIP_ROOT fails ({shorten_error(error)}): check its address "
            "and the credentials in the environment, and run again; what is finished is kept"
        ) from error


def list_names(url: str) -> list[str]:
    """The names right below a URL, as it is now."""
    open_filesystem(url).invalidate_cache()
    try:
        found = ask_root(url, "ls", url, detail=False)
    except FileNotFoundError:
        return []
    return [str(one).rstrip("/").rpartition("/")[2] for one in found]


def url_in_store(path: Path, copy: WorkingCopy) -> str:
    """The place in the store of what is or would be at `path` of its working copy."""
    return f"{copy.url}/{path.absolute().relative_to(copy.place)}"


def open_working_copy(url: str, place: Path, limit_bytes: float) -> None:
    """Make `place` the working copy of the store at `url`, with the manifests of now. A process
    that is alone in it makes room if more than `limit_bytes` are in use."""
    place.mkdir(parents=True, exist_ok=True)
    if not (place / WORKING_COPY).exists():
        identity = {"url": url, "name": uuid.uuid4().hex}
        write_atomically(place / WORKING_COPY, json.dumps(identity))
    find_working_copy.cache_clear()
    with ThreadPoolExecutor(AT_ONCE, "manifests") as pool:
        stages = [f"{url}/{name}" for name in list_names(url) if not name.startswith(".")]
        known = {
            place / stage.rpartition("/")[2] / name
            for stage, names in zip(stages, pool.map(list_names, stages), strict=True)
            for name in names
            if _DIGEST.fullmatch(name)
        }
        here = {file.parent for file in place.glob(f"*/*/{MANIFEST}")}
        for _ in pool.map(pull_manifest, known | here):
            continue
    _hold_working_copy(place, limit_bytes)


@cache
def _hold_working_copy(place: Path, limit_bytes: float) -> IO[str]:
    """A lock that this process holds to its end, with others: files in use are not evicted."""
    lock = (place / ROOT_LOCK).open("w")
    with suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _evict_files(place, limit_bytes)
    fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


def pull_manifest(folder: Path, *, is_locked: bool = False) -> None:
    """Make an artifact as finished, pruned or unfinished here as it is in the store, unless another
    process is making it; with `is_locked` it is this one."""
    copy = find_working_copy(str(folder))
    assert copy is not None, f"{folder} is in no working copy"
    url, both = url_in_store(folder, copy), (MANIFEST, PRUNED)
    names = list_names(url)
    kept = next((name for name in both if name in names), "")
    text = ask_root(f"{url}/{kept}", "cat_file").decode() if kept else ""
    local = next((name for name in both if (folder / name).exists()), "")
    if kept == local and (not kept or (folder / kept).read_text() == text):
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = None if is_locked else lock_file(folder / LOCK)
    if lock is None and not is_locked:
        return
    # What a killed run left might be taken for the files of this manifest.
    _remove_files(folder, {LOCK})
    if kept == MANIFEST:
        for name, (size, sha256) in _listed_files(text, url).items():
            if "/" not in name and size <= SMALL_BYTES:
                _fetch_file(copy, folder / name, size, sha256)
    if kept:
        write_atomically(folder / kept, text)
    if lock is not None:
        lock.close()


def fetch_artifact(folder: Path, part: str = "", report: Report = report_nothing) -> Path:
    """Have the files of a finished artifact on this machine, all but shards, or those whose path
    begins with `part`; returns its folder. InputError: they are not those of the manifest."""
    copy = find_working_copy(str(folder))
    if copy is None or not (folder / MANIFEST).exists():
        return folder
    os.utime(folder / MANIFEST)  # so that others are evicted first
    wanted = _listed_files((folder / MANIFEST).read_text(), str(folder))
    if BULK in wanted:
        if not (folder / BULK).exists():
            _fetch_file(copy, folder / BULK, *wanted[BULK])
        bulk = [json.loads(line) for line in (folder / BULK).read_text().splitlines()]
        if not _is_of_shards(one["path"] for one in bulk):
            wanted |= {one["path"]: (one["size"], "") for one in bulk}
    here = {str(one.relative_to(folder)) for one in folder.rglob("*")}
    missing = [name for name in wanted if name.startswith(part) and name not in here]
    with ThreadPoolExecutor(AT_ONCE, "fetching") as pool:
        fetched = pool.map(lambda name: _fetch_file(copy, folder / name, *wanted[name]), missing)
        for done, _ in enumerate(fetched, 1):
            report(done, len(missing), f"files of {folder.parent.name} {folder.name} fetched")
    return folder


def _fetch_file(copy: WorkingCopy, path: Path, size: int, sha256: str) -> None:
    if ".." in path.parts or not path.is_relative_to(copy.place):
        raise InputError(f"{copy.url}: a manifest names {path}, which is outside of its artifact")
    url = url_in_store(path, copy)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path, sync=False) as beside:
        try:
            ask_root(url, "get_file", url, str(beside))
        except FileNotFoundError:
            raise InputError(f"{url} is missing, which {MANIFEST} beside it names") from None
        with beside.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest() if sha256 else ""
        if (beside.stat().st_size, found) != (size, sha256):
            raise InputError(
                f"{url} is not the file that {MANIFEST} names ({size:,} bytes, SHA-256 "
                f"{sha256[:16] or 'not noted'}): put it back, or delete {MANIFEST} there so that "
                "its stage makes it again"
            )


def withdraw_manifest(folder: Path) -> None:
    """Unfinish an artifact, everywhere."""
    copy = find_working_copy(str(folder))
    if copy is not None:
        with suppress(FileNotFoundError):
            ask_root(url_in_store(folder / MANIFEST, copy), "rm_file")
    (folder / MANIFEST).unlink()


class Outbox:
    """Files of an artifact in the making on their way to the store. Those that are there already
    are not sent again, and may be gone from this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.copy = folder, find_working_copy(str(folder))
        self._journal, self._lock = folder / SENT, threading.Lock()
        self._sent: dict[str, FileState] = {}
        self._moving: list[Future[None]] = []
        self._pool = ThreadPoolExecutor(AT_ONCE, "sending")
        for line in self._journal.read_bytes().splitlines() if self._journal.exists() else ():
            with suppress(ValueError):  # a line that a kill cut short is nothing
                name, size, changed_ns = json.loads(line)
                self._sent[name] = size, changed_ns

    def state_of(self, path: Path) -> FileState:
        """A file's state, also of one that is in the store alone; raises OSError."""
        try:
            found = path.stat()
        except FileNotFoundError:
            if known := self._sent.get(str(path.relative_to(self._folder))):
                return known
            raise
        return found.st_size, found.st_mtime_ns

    def move_files(self, paths: Iterable[Path]) -> None:
        """Begin to send files that will not change, and to remove them here; `wait_for_all`."""
        if self.copy is not None:
            self._moving += [self._pool.submit(self._send_file, one, True) for one in paths]

    def wait_for_all(self) -> None:
        while self._moving:
            self._moving.pop().result()

    def publish_files(
        self, files: Paths, bulk: Paths, manifest: str, check: Callable[[], None], report: Report
    ) -> None:
        """Send what was not sent yet and, if nothing stands against it by `check`, the manifest;
        shards are gone from this machine afterwards."""
        if self.copy is None:
            return
        self.wait_for_all()
        all_of_it = [*files, *bulk]
        for done, _ in enumerate(self._pool.map(self._send_file, all_of_it), 1):
            report(done, len(all_of_it), f"files put into {self.copy.url}")
        check()
        url = url_in_store(self._folder / MANIFEST, self.copy)
        ask_root(url, "pipe_file", url, manifest.encode())
        for path in bulk if _is_of_shards(map(str, bulk)) else ():
            path.unlink(missing_ok=True)
        self._journal.unlink(missing_ok=True)

    def _send_file(self, path: Path, is_moved: bool = False) -> None:
        name, state = str(path.relative_to(self._folder)), self.state_of(path)
        if self._sent.get(name) != state:
            assert self.copy is not None, "a root that is a folder sends nothing"
            url = url_in_store(path, self.copy)
            ask_root(url, "put_file", str(path), url)
            with self._lock, self._journal.open("a") as journal:
                journal.write(json.dumps([name, *state]) + "\n")
            self._sent[name] = state
        if is_moved:
            path.unlink(missing_ok=True)


def _listed_files(manifest: str, where: str) -> dict[str, tuple[int, str]]:
    """Path -> (bytes, SHA-256) of the files that a manifest names."""
    try:
        files = json.loads(manifest)["files"]
        return {name: (int(one["size"]), str(one["sha256"])) for name, one in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{where}/{MANIFEST} is not a manifest ({error}): delete it, so that it is made again"
        ) from None


def _is_of_shards(bulk: Iterable[str]) -> bool:
    """Return whether bulk files are shards, with what lies beside them; others are read here."""
    return any(name.endswith(".tar") for name in bulk)


def _evict_files(place: Path, limit_bytes: float) -> None:
    """Remove files of finished artifacts but for those used last, which take no more than so many
    bytes."""
    folders = [file.parent for file in place.glob(f"*/*/{MANIFEST}")]
    in_use = 0
    for folder in sorted(folders, key=lambda one: -(one / MANIFEST).stat().st_mtime):
        in_use += sum(one.stat().st_size for one in folder.rglob("*") if one.is_file())
        if in_use > limit_bytes:
            listed = _listed_files((folder / MANIFEST).read_text(), str(folder))
            small = {name for name, (size, _) in listed.items() if size <= SMALL_BYTES}
            _remove_files(folder, small | {LOCK, MANIFEST})


def _remove_files(folder: Path, kept: Container[str]) -> None:
    for path in (one for one in folder.iterdir() if one.name not in kept):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
