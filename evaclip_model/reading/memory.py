"""Memory for batches of images, used again once nobody holds the batch.

Covers: tensors over arrays that come back. Not here: what is written into them (reader.py).

A fresh batch of ten megabytes is a page fault for every 4 KiB, each of which the kernel clears:
a tenth of the time that reading, decoding and cropping its images takes.
"""

from __future__ import annotations

import math
import weakref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class BatchMemory:
    """As many batches of one shape as are held at a time."""

    def __init__(self, images: int, size: int) -> None:
        """Nothing is allocated yet.

        Args:
            images: of a batch.
            size: side S of an image, in pixels.
        """
        self._shape = (images, size, size, 3)
        self._free: list[NDArray[np.uint8]] = []

    def take(self) -> Tensor:
        """[b, 3, S, S] uint8 of any content, the channels last in memory.

        Its memory is given to a later batch once neither it nor any view of it is held.
        """
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(math.prod(self._shape), np.uint8)
        # The storage of tensor and views holds this array, not only the tensor's Python object.
        held = memory[:]
        weakref.finalize(held, self._free.append, memory).atexit = False
        return torch.from_numpy(held).view(self._shape).permute(0, 3, 1, 2)
