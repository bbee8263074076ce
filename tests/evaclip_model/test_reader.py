"""Batches depend on their step alone: not on ranks, or what was read before."""

import os
import shutil
import subprocess
import sys
import time
from collections import Counter

import psutil
import pytest
import torch

from evaclip_model.errors import InputError
from evaclip_model.reading.reader import BatchReader, ReadSettings
from evaclip_model.reading.samples import ShardManifest
from evaclip_model.training.config import TrainConfig


def config(**changes):
    settings = {"name": "x", "image_px": 16, "samples_seen": 24 * 30, "global_batch": 24}
    settings |= {"lanes": 6, "shuffle_buffer": 4, "source_weights": {"a": 0.8, "b": 0.2}}
    return TrainConfig(**{**settings, **changes})


def reader(folder, *, rank=0, ranks=1, workers=0, **changes):
    settings = ReadSettings(workers=workers)
    manifest = folder / "shards.json"
    return BatchReader(manifest, config(**changes), rank=rank, ranks=ranks, settings=settings)


def assert_same(ours, theirs):
    assert ours.captions == theirs.captions
    assert ours.origins == theirs.origins
    assert torch.equal(ours.images, theirs.images)
    assert torch.equal(ours.positions, theirs.positions)


def test_a_batch_says_where_each_of_its_samples_comes_from(small_shards):
    sources = {"a0.tar": range(20), "a1.tar": range(20, 35), "a2.tar": range(35, 48)}
    sources |= {"b0.tar": range(48, 58), "b1.tar": range(58, 72)}
    batch = reader(small_shards).read_batch(1)
    for origin, caption in zip(batch.origins, batch.captions, strict=True):
        assert caption.endswith(f"number {origin.key}")
        assert int(origin.key) in sources[origin.shard]


def test_the_channels_of_a_batch_are_last_in_memory(small_shards):
    images = reader(small_shards).read_batch(0).images
    assert images.shape == (24, 3, 16, 16)
    assert images.stride() == (768, 1, 48, 3)


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_ranks_together_read_what_one_reads_in_the_same_order(small_shards, ranks):
    whole = reader(small_shards)
    parts = [reader(small_shards, rank=rank, ranks=ranks) for rank in range(ranks)]
    for step in range(12):
        expected = whole.read_batch(step)
        shares = [part.read_batch(step) for part in parts]
        assert sum((share.captions for share in shares), ()) == expected.captions
        assert torch.equal(torch.cat([share.images for share in shares]), expected.images)
        assert torch.equal(torch.cat([s.positions for s in shares]), expected.positions)


def test_a_reader_that_starts_late_goes_on_exactly(small_shards):
    from_start = list(reader(small_shards).iterate_batches(0, 20))
    for ours, theirs in zip(
        reader(small_shards).iterate_batches(13, 20), from_start[13:], strict=True
    ):
        assert_same(ours, theirs)


def test_sources_are_drawn_by_weight_and_no_sample_again_before_all(small_shards):
    steps = 10  # 240 draws: 192 of a (four times its 48), 48 of b (twice its 24)
    one = reader(small_shards)
    seen = Counter(caption for step in range(steps) for caption in one.read_batch(step).captions)
    assert one.count_drawn(steps) == {"a": 192, "b": 48}
    assert sum(seen.values()) == 240
    of_a = [n for caption, n in seen.items() if int(caption.rsplit(" ", 1)[1]) < 48]
    assert len(of_a) == 48
    assert sum(of_a) == 192


def test_without_weights_sources_are_drawn_as_large_as_they_are(small_shards):
    assert reader(small_shards, source_weights={}).count_drawn(3) == {"a": 48, "b": 24}


def workers_of(rank):
    children = psutil.Process(rank).children()
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def spoilt_copy(shards, tmp_path):
    """The shards, one image of them no image any more."""
    folder = tmp_path / "spoilt"
    shutil.copytree(shards, folder)
    shard = folder / "a0.tar"
    content = bytearray(shard.read_bytes())
    content[1024 - 512 : 1024 - 512 + 64] = b"\xff" * 64  # the first image's header
    shard.write_bytes(content)
    return folder


def test_a_bad_image_is_counted_and_replaced_by_its_neighbour(small_shards, tmp_path):
    folder = spoilt_copy(small_shards, tmp_path)
    spoilt, whole = reader(folder), reader(small_shards)
    for step in range(10):
        ours, theirs = spoilt.read_batch(step), whole.read_batch(step)
        changed = sum(a != b for a, b in zip(ours.captions, theirs.captions, strict=True))
        assert changed == ours.images.ne(theirs.images).flatten(1).any(1).sum()
    assert 1 <= spoilt.bad.total() <= 10
    assert whole.bad.total() == 0


def test_a_truncated_shard_is_one_sentence(small_shards, tmp_path):
    folder = tmp_path / "short"
    shutil.copytree(small_shards, folder)
    path = folder / ShardManifest.read(folder / "shards.json").shards[0].path
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"a0\.tar.*verify the shards again"):
        for batch in reader(folder).iterate_batches(0, 10):
            assert batch.captions


@pytest.mark.parametrize("workers", [2, 5])
def test_worker_processes_make_the_same_batches_and_end(small_shards, workers):
    expected = list(reader(small_shards).iterate_batches(2, 9))
    shared = reader(small_shards, workers=workers)
    for ours, theirs in zip(shared.iterate_batches(2, 9), expected, strict=True):
        assert ours.step == theirs.step
        assert_same(ours, theirs)
    assert not workers_of(os.getpid())


def test_a_rank_slower_than_its_workers_gets_every_step(small_shards):
    """Workers are done, and may have ended, long before their last parts are taken."""
    taken = []
    for batch in reader(small_shards, workers=1).iterate_batches(0, 6):
        time.sleep(0.5)
        taken.append(batch.step)
    assert taken == [*range(6)]


def test_bad_images_that_workers_meet_are_counted_by_the_rank(small_shards, tmp_path):
    folder = spoilt_copy(small_shards, tmp_path)
    alone, shared = reader(folder), reader(folder, workers=3)
    for ours, theirs in zip(
        shared.iterate_batches(0, 10), alone.iterate_batches(0, 10), strict=True
    ):
        assert_same(ours, theirs)
    assert shared.bad == alone.bad
    assert shared.bad.total() >= 1


def test_a_killed_worker_is_an_error_at_once_and_leaves_no_other(small_shards):
    batches = reader(small_shards, workers=2).iterate_batches(0, 500)
    next(batches)
    workers = workers_of(os.getpid())
    assert len(workers) == 2
    workers[1].kill()
    with pytest.raises(RuntimeError, match=r"killed by signal|exited unexpectedly"):
        for batch in batches:
            assert batch.captions
    assert not workers_of(os.getpid())


def test_what_a_worker_cannot_read_is_the_same_sentence(small_shards, tmp_path):
    folder = tmp_path / "short"
    shutil.copytree(small_shards, folder)
    path = folder / "a0.tar"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"a0\.tar.*verify the shards again"):
        for batch in reader(folder, workers=2).iterate_batches(0, 10):
            assert batch.captions


def test_workers_end_when_their_rank_is_killed(small_shards, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        "import sys; from pathlib import Path\n"
        "from evaclip_model.reading.reader import BatchReader, ReadSettings\n"
        "from evaclip_model.training.config import TrainConfig\n"
        "config = TrainConfig(**eval(sys.argv[2]))\n"
        "manifest, settings = Path(sys.argv[1]), ReadSettings(workers=2)\n"
        "reader = BatchReader(manifest, config, rank=0, ranks=1, settings=settings)\n"
        "if __name__ == '__main__':\n"
        "  for batch in reader.iterate_batches(0, 10**6): print(batch.step, flush=True)\n"
    )
    command = [sys.executable, script, small_shards / "shards.json", repr(config().model_dump())]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as rank:
        assert rank.stdout.readline() == b"0\n"
        workers = workers_of(rank.pid)
        assert len(workers) == 2
        rank.kill()
        _, left = psutil.wait_procs(workers, timeout=10)
    assert not left


@pytest.mark.parametrize("ranks", [1, 3])
def test_resampled_batches_depend_on_their_step_alone(small_shards, ranks):
    whole = reader(small_shards, sampling="resampled")
    whole_batches = [whole.read_batch(step) for step in range(12)]
    for rank in range(ranks):
        part = reader(small_shards, rank=rank, ranks=ranks, sampling="resampled")
        size = 24 // ranks
        for batch in part.iterate_batches(5, 12):
            theirs = whole_batches[batch.step]
            assert batch.captions == theirs.captions[rank * size : (rank + 1) * size]
            assert torch.equal(batch.images, theirs.images[rank * size : (rank + 1) * size])
    exact = reader(small_shards)
    assert exact.read_batch(0).captions != whole_batches[0].captions
    assert whole.count_drawn(10) == exact.count_drawn(10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source_weights": {"c": 1.0}}, "names 'c'"),
        ({"lanes": 24}, None),
        ({"lanes": 48, "global_batch": 48}, "24 samples for 48 lanes"),
    ],
)
def test_settings_that_do_not_fit_the_shards_are_refused(small_shards, changes, message):
    if message is None:
        reader(small_shards, **changes)
        return
    with pytest.raises(InputError, match=message):
        reader(small_shards, **changes)


@pytest.mark.parametrize("sampling", ["exact", "resampled"])
@pytest.mark.parametrize("ranks", [4, 5, 16])
def test_any_number_of_ranks_shares_the_same_batches(small_shards, ranks, sampling):
    whole = reader(small_shards, sampling=sampling)
    wanted = {step: whole.read_batch(step) for step in range(3, 9)}
    readers = (
        reader(small_shards, rank=rank, ranks=ranks, sampling=sampling) for rank in range(ranks)
    )
    parts = [list(one.iterate_batches(3, 9)) for one in readers]
    for together in zip(*parts, strict=True):
        expected = wanted[together[0].step]
        sizes = {len(part.captions) for part in together}
        assert max(sizes) - min(sizes) <= 1
        assert sum((part.captions for part in together), ()) == expected.captions
        assert torch.equal(torch.cat([part.images for part in together]), expected.images)
        assert torch.equal(torch.cat([part.positions for part in together]), expected.positions)


def test_more_ranks_than_pairs_are_refused(small_shards):
    with pytest.raises(InputError, match="25 ranks cannot share 24 pairs"):
        reader(small_shards, ranks=25)
