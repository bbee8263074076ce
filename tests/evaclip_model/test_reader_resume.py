"""Two epochs read by one, two and then three ranks, killed in between, against one that is not."""

import json
import zlib
from collections import Counter
from pathlib import Path

import pytest

from evaclip_model.reading.reader import BatchReader, ReadSettings
from evaclip_model.training.config import TrainConfig

RANK = Path(__file__).with_name("reading_rank.py")
EPOCH = 72 // 12
STEPS = 2 * EPOCH
"""Source a holds 48 samples and b 24, drawn as large as they are."""
CONFIG = {"name": "x", "image_px": 16, "samples_seen": 12 * STEPS, "global_batch": 12}
CONFIG |= {"lanes": 6, "shuffle_buffer": 5, "seed": 7}


def whole_lines(folder, ranks):
    """step -> what all ranks together wrote of it, for the steps that every one wrote whole."""
    read = []
    for rank in range(ranks):
        lines = (folder / f"{rank}.jsonl").read_text().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        read.append({row["step"]: row for row in rows})
    common = set.intersection(*(set(rows) for rows in read))
    return {
        step: {
            key: [value for rows in read for value in rows[step][key]]
            for key in ("captions", "positions", "pixels")
        }
        for step in common
    }


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_resumed_on_one_two_and_three_ranks_two_epochs_are_the_plan(
    ranks, small_shards, tmp_path, workers
):
    manifest = small_shards / "shards.json"
    seen, first = {}, 0
    for count, kill in ((1, 2), (2, 6), (3, 9), (1, -1)):
        folder = tmp_path / f"{first}-{count}"
        folder.mkdir()
        command = [RANK, manifest, json.dumps(CONFIG), first, STEPS, workers, folder, kill]
        pids = ranks.start(count, folder, *command)
        codes = ranks.wait(pids)
        assert codes[-1] == (0 if kill < 0 else -9)
        done = whole_lines(folder, count)
        # The checkpoint is older than the kill by a step or two: those steps are read again.
        until = STEPS if kill < 0 else max(first, kill - 1)
        assert set(range(first, until)) <= set(done)
        seen |= {step: done[step] for step in range(first, until)}
        first = until

    undisturbed = BatchReader(
        manifest, TrainConfig(**CONFIG), rank=0, ranks=1, settings=ReadSettings()
    )
    expected = list(undisturbed.iterate_batches(0, STEPS))
    assert sorted(seen) == list(range(STEPS))
    for batch in expected:
        assert tuple(seen[batch.step]["captions"]) == batch.captions
        assert seen[batch.step]["positions"] == batch.positions.tolist()
        assert seen[batch.step]["pixels"] == [
            zlib.crc32(one.contiguous().numpy()) for one in batch.images
        ]

    order = [caption for step in range(STEPS) for caption in seen[step]["captions"]]
    assert Counter(order) == Counter({caption: 2 for caption in set(order)})
    assert len(order) == 2 * 72
    for epoch in (order[:72], order[72:]):
        assert len(set(epoch)) == 72
    assert order[:72] != order[72:]
