"""Which of several equal or similar samples stay, beside the rule said one row at a time."""

from __future__ import annotations

from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, strategies as some

from tasks.dataset import choose
from tasks.dataset.choose import _find_later, _later_looks
from tasks.index.perceptual_hash import near_pairs


@given(
    some.lists(some.sets(some.integers(0, 12), max_size=2), max_size=40),
    some.sets(some.integers(1, 40)),
)
def test_a_row_goes_when_an_earlier_one_that_stays_shares_a_group(
    groups: list[set[int]], cuts: set[int]
) -> None:
    taken: set[int] = set()
    expected = []
    for row, mine in enumerate(groups):
        if mine & taken:
            expected.append(row)
        else:
            taken |= mine
    first = {group: row for row, mine in reversed([*enumerate(groups)]) for group in mine}
    told, gone = np.zeros(13, dtype=np.bool_), list[int]()
    for start, stop in pairwise([0, *sorted(cuts), 41]):  # whole rows, batch by batch
        pairs = [
            (row, group, first[group])
            for row, mine in list(enumerate(groups))[start:stop]
            for group in sorted(mine)
        ]
        gone += _find_later(*np.array(pairs, dtype=np.int64).reshape(-1, 3).T, told).tolist()
    assert sorted(set(gone)) == expected


@given(some.lists(some.integers(0, 31), max_size=40), some.integers(1, 2), some.data())
def test_a_row_goes_when_it_looks_like_an_earlier_one_that_stays(
    hashes: list[int], most: int, data: some.DataObject
) -> None:
    looks = np.array(hashes, dtype=np.uint64)
    candidates = [row for row in range(len(hashes)) if data.draw(some.booleans())]
    stay: list[int] = []
    for row in candidates:
        if all((hashes[row] ^ hashes[other]).bit_count() > most for other in stay):
            stay.append(row)
    for least in (choose.PAIRED_AT_LEAST, 1):  # all at once, and half by half
        with (
            mock.patch.object(choose, "PAIRED_AT_LEAST", least),
            mock.patch.object(choose, "is_crowded", return_value=True),
        ):
            gone = _later_looks(looks, most, np.array(candidates, dtype=np.int64))
        assert gone.tolist() == [row for row in candidates if row not in stay]


def test_pairs_of_a_crowd_that_looks_alike_are_not_all_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = np.random.default_rng(0).integers(0, 2**63, 20_000, dtype=np.uint64)
    crowd = np.arange(0, 20_000, 5)
    first, second = np.random.default_rng(1).integers(0, 64, (2, len(crowd)), dtype=np.uint64)
    looks[crowd] = looks[0] ^ (np.uint64(1) << first) ^ (np.uint64(1) << second)
    held = []

    def count_pairs(hashes: np.ndarray, most: int) -> np.ndarray:
        pairs = near_pairs(hashes, most)
        held.append(len(pairs))
        return pairs

    monkeypatch.setattr(choose, "near_pairs", count_pairs)
    gone = _later_looks(looks, 4, np.arange(20_000))
    assert gone.tolist() == crowd[1:].tolist()
    assert max(held) < 200_000  # of 8 million
