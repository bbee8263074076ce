"""Shards drawn with replacement: random access, shares, independence of lanes; what comes next."""

from __future__ import annotations

from collections import Counter
from itertools import groupby, pairwise

import numpy as np
import pytest

from evaclip_model.reading.order import DRAWN_AT_ONCE, ORDERS, SourceOrder

SAMPLES = [10, 3, 25, 8]


def order(
    kind: str, samples: list[int] = SAMPLES, *, window: int = 7, seed: int = 1
) -> SourceOrder:
    return ORDERS[kind](samples, source=0, lanes=4, window=window, seed=seed)


def drawn(one: SourceOrder, lane: int, first: int, stop: int) -> list[tuple[int, int]]:
    """(shard, place in it) of a lane's draws."""
    found = []
    for draw in range(first, stop):
        epoch, window, place = one.locate_draw(lane, draw)
        inside = [
            (piece.shard, index)
            for piece in one.list_pieces(lane, epoch, window)
            for index in range(piece.start, piece.stop)
        ]
        found.append(inside[one.shuffle_window(lane, epoch, window)[place]])
    return found


def test_resampled_draws_are_whole_shards_in_shuffled_windows():
    one = order("resampled", window=5)
    seen = Counter(drawn(one, 2, 0, 400))
    read = [s for w in range(80) for s in one.list_pieces(2, 0, w)]
    ends = np.cumsum([piece.stop - piece.start for piece in read])
    assert ends[-1] == 400
    assert set(seen) <= {(s, i) for s, count in enumerate(SAMPLES) for i in range(count)}
    for before, after in pairwise(read):
        goes_on = (after.shard, after.start) == (before.shard, before.stop)
        assert goes_on or (after.start == 0 and before.stop == SAMPLES[before.shard])


def test_resampled_draws_do_not_depend_on_what_was_asked_before():
    far = 3 * DRAWN_AT_ONCE * 12
    used = order("resampled")
    drawn(used, 0, 0, 50)
    drawn(used, 1, far, far + 20)
    assert drawn(used, 0, far, far + 50) == drawn(order("resampled"), 0, far, far + 50)


def test_resampled_shards_are_drawn_alike_often_and_lanes_differ():
    one = order("resampled", [10] * 4)
    lanes = [one.shards_from(lane, 0, 0, 4000) for lane in range(2)]
    for shards in lanes:
        assert all(850 < count < 1150 for count in Counter(shards).values())  # 1000 expected
    assert lanes[0] != lanes[1]
    assert lanes[0] != order("resampled", [10] * 4, seed=2).shards_from(0, 0, 0, 4000)


@pytest.mark.parametrize("kind", ["exact", "resampled"])
def test_the_next_shards_are_those_that_the_next_windows_consist_of(kind):
    one = order(kind, [10, 3, 25, 8, 14], window=4)
    for lane in range(4):
        epoch, window, read = 0, 2, []
        for _ in range(40):
            read += [piece.shard for piece in one.list_pieces(lane, epoch, window)]
            epoch, window = one.next_window(lane, epoch, window)
        expected = [shard for shard, _ in groupby(read)]
        found = [shard for shard, _ in groupby(one.shards_from(lane, 0, 2, 6))]
        assert found == expected[: len(found)]
        assert len(found) >= 3


@pytest.mark.parametrize("kind", ["exact", "resampled"])
def test_windows_follow_each_other_as_draws_do(kind):
    one = order(kind, window=4)
    at = one.locate_draw(1, 0)[:2]
    for draw in range(100):
        now = one.locate_draw(1, draw)[:2]
        if now != at:
            assert now == one.next_window(1, *at)
            at = now
