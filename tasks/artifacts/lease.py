"""The lock of an artifact among machines that share nothing but its store: a lease.

A store has no locks, but makes an object only once (S3: If-None-Match). Leases of an artifact are
numbered; whoever makes the next number holds it, and writes again and again that it lives. Whoever
wants it watches the newest for a while: clocks of machines are not compared.
"""

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from evaclip_model.errors import InputError
from evaclip_model.reading.urls import find_working_copy
from tasks.artifacts.root_store import SENT, ask_root, list_names, pull_manifest, url_in_store
from tasks.progress import Report

LEASE_S = 60.0
"""Time without a sign of life after which another machine takes over."""
_NAME = re.compile(r"\.lease\.(\d{6})")


@contextmanager
def hold_lease(folder: Path, report: Report) -> Iterator[Callable[[], None]]:
    """Keep other machines from making the artifact in `folder`, whose lock this process holds, and
    see whether one of them made it. Yields what raises InputError if another one took over, because
    this one was silent for too long. InputError: another one is making it."""
    copy = find_working_copy(str(folder))
    if copy is None:
        yield lambda: None
        return
    url, closing = url_in_store(folder, copy), threading.Event()
    newest, before = _read_newest(url)
    while True:
        is_mine = before.get("by") == copy.name  # of a process that is dead: its lock is ours
        if before.get("is_held") and not is_mine:
            _await_silence(url, before, report)
        lease = f"{url}/.lease.{newest + 1:06d}"
        said = {"by": copy.name, "host": socket.gethostname()}
        is_made = _write(lease, {**said, "is_held": True}, mode="create")
        if is_made and _write(lease, {**said, "is_held": True}, mode="create"):
            raise InputError(
                f"{copy.url} does not refuse to make an object twice (If-None-Match of S3): two "
                "machines could make the same artifact; take another store, or a folder"
            )
        if is_made:
            break
        newest, before = _read_newest(url)
    if not is_mine:  # another machine may have put files of its own since
        (folder / SENT).unlink(missing_ok=True)
    pull_manifest(folder, is_locked=True)

    def renew() -> None:
        while not closing.wait(LEASE_S / 4):
            with suppress(InputError):  # the store may come back in time
                _write(lease, {**said, "is_held": True, "at": time.time()})

    def require_held() -> None:
        if _read_newest(url)[0] > newest + 1:
            raise InputError(
                f"another machine took over {url}, because none heard of this one for "
                f"{LEASE_S:.0f} s: run again to go on with what it makes"
            )

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield require_held
    finally:
        closing.set()
        thread.join()
        with suppress(InputError):
            _write(lease, {**said, "is_held": False})


def _await_silence(url: str, before: dict[str, Any], report: Report) -> None:
    """Return when nothing was heard of who holds the newest lease for `LEASE_S`."""
    ends = time.monotonic() + LEASE_S
    while (left := ends - time.monotonic()) > 0:
        report(0, 1, f"{left:.0f} s more for a sign of life of {before['host']}, which began")
        time.sleep(min(left, LEASE_S / 20))
        _, now = _read_newest(url)
        if now != before and now.get("is_held"):
            raise InputError(f"{now['host']} is making {url}: wait for it, or stop it first")


def _read_newest(url: str) -> tuple[int, dict[str, Any]]:
    """Number and content of an artifact's newest lease; 0 and nothing where there is none."""
    found = (_NAME.fullmatch(name) for name in list_names(url))
    newest = max((int(name[1]) for name in found if name), default=0)
    return newest, json.loads(ask_root(f"{url}/.lease.{newest:06d}", "cat_file")) if newest else {}


def _write(lease: str, said: dict[str, Any], **how: Any) -> bool:
    """Write a lease; False: it is there already, and was to be made."""
    try:
        ask_root(lease, "pipe_file", lease, json.dumps(said).encode(), **how)
    except InputError:  # each kind of store has its own error for what is there already
        folder, _, name = lease.rpartition("/")
        if not how or name not in list_names(folder):
            raise
        return False
    return True
