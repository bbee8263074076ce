"""Memory of batches: used again when nobody looks at it, and never before."""

from __future__ import annotations

from evaclip_model.reading.memory import BatchMemory


def test_a_batch_that_is_let_go_gives_its_memory_to_the_next():
    memory = BatchMemory(images=2, size=4)
    batch = memory.take()
    assert batch.shape == (2, 3, 4, 4)
    assert batch.stride() == (48, 1, 12, 3), "the channels should be last in memory"
    place = batch.data_ptr()
    del batch
    assert memory.take().data_ptr() == place


def test_a_view_alone_keeps_a_batch():
    memory = BatchMemory(images=2, size=4)
    kept = memory.take().fill_(7)[1:, 0]
    as_array = memory.take().fill_(8).numpy()[0]
    assert memory.take().fill_(9).shape == (2, 3, 4, 4)
    assert (kept == 7).all()
    assert (as_array == 8).all()
