"""Memory that is used again once nobody holds what was in it.

Covers: stretches of bytes that come back. Not here: what is written into them: batches of images
(reader.py), parts of shards (tar_file.py).

Fresh memory is a page fault for every 4 KiB, each of which the kernel clears: a tenth of the time
that reading, decoding and cropping images takes.
"""

from __future__ import annotations

import weakref
from typing import cast

import numpy as np
from numpy.typing import NDArray


class Memory:
    """As many stretches of one size as are held at a time.

    Attributes:
        size: bytes of each.
    """

    def __init__(self, size: int) -> None:
        """Nothing is allocated yet."""
        self.size = size
        self._free: list[NDArray[np.uint8]] = []

    def take(self) -> memoryview:
        """A stretch of any content, writable.

        It is given out again once neither it nor anything that looks into it (a slice, an array, a
        tensor) is held.
        """
        try:
            stretch = self._free.pop()
        except IndexError:
            stretch = np.empty(self.size, np.uint8)
        # Whatever looks into it holds this array; the stretch itself is held by the list alone.
        held = stretch[:]
        weakref.finalize(held, self._free.append, stretch).atexit = False
        return memoryview(cast(bytearray, held))  # numpy's types do not say that it has a buffer
