"""Host memory that torch frees, kept by glibc for the next use; elsewhere nothing changes. The
kernel would clear each page of every block above 32 MB: keeping them takes a quarter off a B/16's
training step on a CPU (BENCHMARKS.md)."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Names of the options in glibc's malloc.h."""
_NEVER, _TRIM_DEFAULT, _MMAP_DEFAULT = -1, 128 * 1024, 65536


def keep_freed_memory() -> bool:
    """Use freed memory again instead of returning it, in this process, from now on; returns whether
    the C library obeys."""
    library = _load_glibc()
    return bool(
        library and library.mallopt(_MMAP_MAX, 0) and library.mallopt(_TRIM_THRESHOLD, _NEVER)
    )


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep it for the time of the block; what is free at its end is returned."""
    keep_freed_memory()
    try:
        yield
    finally:
        if library := _load_glibc():
            library.mallopt(_MMAP_MAX, _MMAP_DEFAULT)
            library.mallopt(_TRIM_THRESHOLD, _TRIM_DEFAULT)
            library.malloc_trim(0)


def _load_glibc() -> Any:
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
    return library if hasattr(library, "gnu_get_libc_version") else None
