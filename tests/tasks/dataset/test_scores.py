"""Scores and lists of uids: the same rows as a plain reference, ties by uid, hostile lists."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from evaclip_model.errors import InputError
from evaclip_model.reading.samples import Shard
from tasks.dataset import scores
from tasks.dataset.choose import Choice, leave_out_low_scores
from tasks.dataset.config import DatasetConfig, Seen
from tasks.dataset.scores import find_low_scores, read_uids
from tasks.index.sample_index import ShardVerdict

ROW = st.tuples(st.sampled_from([0.1, 0.2, 0.3, 0.4]), st.booleans(), st.integers(0, 2))


@given(st.lists(ROW, min_size=1, max_size=40), st.sampled_from([None, 0.15, 0.3]), st.data())
def test_a_share_keeps_the_best_of_each_source_and_among_equals_the_first_uids(rows, least, data):
    share = data.draw(st.sampled_from([None, 0.0, 0.3, 0.5, 1.0]))
    scores = np.array([row[0] for row in rows], dtype=np.float32)
    stays = np.array([row[1] for row in rows])
    sources = np.array([row[2] for row in rows])
    uids = [f"{(number * 7) % 41:02d}" for number in range(len(rows))]
    low = find_low_scores(
        scores, stays, sources, least, share, lambda some: [uids[row] for row in some]
    )
    expected = set()
    for source in range(3):
        mine = [n for n in range(len(rows)) if stays[n] and sources[n] == source]
        good = [n for n in mine if least is None or scores[n] >= np.float32(least)]
        order = sorted(good, key=lambda n: (-scores[n], uids[n]))
        keep = len(good) if share is None else int(share * len(good) + 0.5)
        expected |= set(mine) - set(order[:keep])
    assert set(np.flatnonzero(low).tolist()) == expected


def test_each_part_that_a_champion_judged_keeps_its_own_share():
    def verdict(source, stored):
        shard = Shard("0.tar", source, stored, 1, "0" * 64)
        return ShardVerdict(path="0.tar", stored=stored, shard=shard, flaws={}, left_out=None)

    verdicts = [verdict(*one) for one in (("a", 2), ("a", 4), ("b", 2), ("a", 2))]
    scores = np.array([np.nan, np.nan, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.91, 0.92], np.float32)
    rules = DatasetConfig(keep_share=0.5)
    by_part = Seen(scores, (), parts=np.repeat([0, 1, 2], [2, 6, 2]))
    for seen, gone in ((by_part, [2, 3, 6, 8]), (Seen(scores, ()), [2, 3, 4, 6])):
        choice = Choice(len(scores))
        counts = leave_out_low_scores(choice, None, verdicts, rules, seen)
        assert np.flatnonzero(choice.left_out).tolist() == gone
        assert {source: sum(parts) for source, parts in counts.items()} == {"a": 6, "b": 2}


def test_lists_of_uids_are_text_or_pairs_of_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "UIDS_AT_ONCE", 2)
    text, pairs = tmp_path / "uids.txt", tmp_path / "uids.npy"
    text.write_text("b\n\na\n")
    np.save(pairs, np.array([(1, 255), (2**64 - 1, 0), (2**63, 2**60 + 10)], dtype="u8,u8"))
    found = [uid for some in read_uids([text, pairs]) for uid in some.to_pylist()]
    assert found == [
        *("b", "a", "0000000000000001" + "00000000000000ff", "f" * 16 + "0" * 16),
        "8000000000000000" + "100000000000000a",
    ]
    assert not list(read_uids([]))


@pytest.mark.parametrize("content", [np.arange(3), np.array([("a", 1)], dtype=object)], ids=str)
def test_an_array_of_something_else_is_one_sentence(tmp_path, content):
    np.save(tmp_path / "x.npy", content, allow_pickle=True)
    with pytest.raises(InputError, match=r"x\.npy cannot be read as a list of uids"):
        list(read_uids([tmp_path / "x.npy"]))
