"""Which of several equal or similar samples stay, beside the rule said one row at a time."""

from __future__ import annotations

import numpy as np
from hypothesis import given, strategies as some

from tasks.dataset.choose import _find_later, _later_looks


@given(some.lists(some.sets(some.integers(0, 12), max_size=2), max_size=40))
def test_a_row_goes_when_an_earlier_one_that_stays_shares_a_group(groups: list[set[int]]) -> None:
    taken: set[int] = set()
    expected = []
    for row, mine in enumerate(groups):
        if mine & taken:
            expected.append(row)
        else:
            taken |= mine
    pairs = [(row, group) for row, mine in enumerate(groups) for group in sorted(mine)]
    rows, numbers = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    assert _find_later(rows, numbers).tolist() == expected


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
    gone = _later_looks(looks, most, np.array(candidates, dtype=np.int64))
    assert gone.tolist() == [row for row in candidates if row not in stay]
