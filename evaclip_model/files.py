"""Files that several processes share: replaced whole, and locked; what is not a file, refused."""

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from evaclip_model.errors import InputError

_SPECIAL = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device"}


def refuse_special(path: Path | str) -> None:
    """Refuse a pipe, a socket or a device, whose reader may wait without end; what is not there, or
    at a URL, is left to whoever opens it."""
    try:
        kind = _SPECIAL.get(stat.S_IFMT(os.stat(path).st_mode))
    except (OSError, ValueError):
        return
    if kind is not None:
        raise InputError(f"{path} is {kind}, not a file: write its content into one")


@contextmanager
def replace_file(path: Path, *, beside: Path | None = None, sync: bool = True) -> Iterator[Path]:
    """Yield a path to write to, `beside`; it takes the place of `path` when the block ends without
    an error. By default it is a hidden name in the same folder that no other process uses. With
    `sync` the content is on the disk before the rename."""
    beside = beside or path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        if sync:
            with beside.open("rb") as file:
                os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: str | bytes, *, sync: bool = True) -> None:
    """Write text (UTF-8) or bytes beside `path` and rename it: it is never seen half-written."""
    with replace_file(path, sync=sync) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)


def lock_file(path: Path, *, shared: bool = False) -> IO[str] | None:
    """Lock a file, made if need be; None when another process holds it, or where `shared` holds it
    for itself alone. Close what is returned to let go; the kernel does so when the holder dies."""
    lock = path.open("w")
    try:
        fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock
