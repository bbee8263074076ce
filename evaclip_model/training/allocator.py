"""What the C library does with host memory that torch frees.

Covers: keeping it in the process, on glibc. Not here: memory of GPUs, which torch keeps itself.

glibc asks the kernel for every block above 32 MB anew and returns it when it is freed, and the top
of its heap as well. The kernel clears each page that it hands out: on CPUs a quarter of a B/16's
training step, most of all in the update, whose temporaries are as large as the model.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Names of the options in glibc's malloc.h."""
_NEVER = -1


def keep_freed_memory() -> bool:
    """Use freed memory again instead of returning it, in this process, from now on.

    The process then keeps what it needed at its largest. Returns whether the C library obeys.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False  # no glibc
    return bool(set_option(_MMAP_MAX, 0) and set_option(_TRIM_THRESHOLD, _NEVER))
