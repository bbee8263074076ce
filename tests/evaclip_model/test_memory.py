"""Memory that comes back: used again when nobody looks at it, and never before."""

from __future__ import annotations

import numpy as np
import torch

from evaclip_model.cpu.buffer_pool import Memory


def test_a_stretch_that_is_let_go_gives_its_memory_to_the_next() -> None:
    memory = Memory(96)
    stretch = memory.take()
    assert len(stretch) == memory.size == 96
    place = np.asarray(stretch).ctypes.data
    del stretch
    assert np.asarray(memory.take()).ctypes.data == place


def test_whatever_looks_into_it_keeps_it() -> None:
    memory = Memory(64)

    def filled(value: int) -> memoryview:
        stretch = memory.take()
        stretch[:] = bytes([value]) * len(stretch)
        return stretch

    looks = [
        torch.frombuffer(filled(1), dtype=torch.uint8).view(4, 4, 4).permute(2, 0, 1)[1:, 0],
        torch.frombuffer(filled(2), dtype=torch.uint8).view(8, 8).numpy()[0],
        np.asarray(filled(3)).reshape(8, 8)[2:].T,
        np.frombuffer(filled(4)[3:9][:2], np.uint8),
        filled(5)[9:12][:1],
    ]
    filled(9)
    for number, look in enumerate(looks, 1):
        assert (np.asarray(look) == number).all()
