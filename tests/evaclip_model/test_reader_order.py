"""Which sample stands where: exact mix, whole epochs, dependence on the position alone."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from evaclip_model.reading.order import Mixture, SourceOrder, mixing_pattern


def test_sources_are_drawn_four_to_one_exactly():
    pattern = mixing_pattern({"laion": 0.8, "coyo": 0.2})
    assert sorted(pattern) == ["coyo"] + ["laion"] * 4
    mixture = Mixture({"laion": 0.8, "coyo": 0.2}, global_batch=32, lanes=4)
    drawn = np.concatenate(
        [mixture.draw_sources(step, lane) for step in range(50) for lane in range(4)]
    )
    for first in range(0, len(drawn) - 5):
        assert Counter(drawn[first : first + 5].tolist()) == {0: 4, 1: 1}


@settings(max_examples=30, deadline=None)
@given(
    weights=st.lists(st.floats(0.05, 1), min_size=1, max_size=3),
    lanes=st.sampled_from([1, 2, 4]),
    per_lane=st.integers(1, 9),
    step=st.integers(0, 40),
)
def test_draws_are_counted_as_they_are_made(weights, lanes, per_lane, step):
    named = {str(number): weight for number, weight in enumerate(weights)}
    mixture = Mixture(named, global_batch=lanes * per_lane, lanes=lanes)
    for lane in range(lanes):
        counted = np.zeros(len(named), dtype=int)
        for earlier in range(step):
            counted += np.bincount(mixture.draw_sources(earlier, lane), minlength=len(named))
        assert counted.tolist() == mixture.drawn_before(step, lane).tolist()


@pytest.mark.parametrize(("global_batch", "lanes"), [(12, 6), (6, 2), (24, 4), (8, 4)])
def test_every_lane_draws_every_source_in_its_share_whatever_the_batch(global_batch, lanes):
    mixture = Mixture({"a": 2, "b": 1, "c": 3}, global_batch=global_batch, lanes=lanes)
    steps = 6 * global_batch
    for lane in range(lanes):
        drawn = mixture.drawn_before(steps, lane)
        assert (drawn * [3, 6, 2] == mixture.per_lane * steps).all()


@pytest.mark.parametrize("window", [1, 7, 1000])
def test_an_epoch_holds_every_sample_once_and_the_next_has_another_order(window):
    samples, lanes = [10, 3, 25, 8], 4
    order = SourceOrder(samples, source=0, lanes=lanes, window=window, seed=1)
    epochs = []
    for epoch in range(2):
        seen = []
        for lane in range(lanes):
            length = order.lane_length(lane)
            for draw in range(epoch * length, (epoch + 1) * length):
                at, number, place = order.locate_draw(lane, draw)
                assert at == epoch
                inside = [
                    (piece.shard, index)
                    for piece in order.list_pieces(lane, at, number)
                    for index in range(piece.start, piece.stop)
                ]
                seen.append(inside[order.shuffle_window(lane, at, number)[place]])
        assert sorted(seen) == [(s, i) for s, count in enumerate(samples) for i in range(count)]
        epochs.append(seen)
    assert epochs[0] != epochs[1]
