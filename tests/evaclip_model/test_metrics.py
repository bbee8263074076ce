"""Hit rates, class means, precision areas, intervals and tests, against hand-made cases."""

from __future__ import annotations

import itertools

import pytest
import torch

from evaclip_model import metrics


def test_mean_per_class_counts_a_rare_class_as_much_as_a_common_one():
    labels = torch.tensor([0, 0, 0, 2])
    correct = torch.tensor([True, True, True, False])
    assert metrics.mean_per_class(correct, labels) == pytest.approx(0.5)


def test_wilson_interval_agrees_with_published_values():
    # Newcombe (1998), Table I: 81/263, 15/148, 0/20 and 1/29, method 3.
    for (hits, n), expected in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0000, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert metrics.wilson_interval(hits, n) == pytest.approx(expected, abs=5e-5)
    assert metrics.wilson_interval(20, 20)[1] == 1.0


def test_captions_of_one_image_do_not_count_as_independent():
    draw = torch.Generator().manual_seed(0)
    per_image = torch.rand(200, generator=draw) < 0.4
    cluster = torch.arange(200).repeat_interleave(5)
    low, high = metrics.percentile_interval(
        metrics.resampled_means(per_image.repeat_interleave(5), cluster)
    )
    share = float(per_image.double().mean())
    naive = metrics.wilson_interval(int(per_image.sum()) * 5, 1000)
    honest = metrics.wilson_interval(int(per_image.sum()), 200)
    assert low < share < high
    assert high - low == pytest.approx(honest[1] - honest[0], rel=0.1)
    assert high - low > 1.8 * (naive[1] - naive[0])


def test_chance_is_the_share_of_all_orders_with_a_hit():
    gallery, right, k = 6, 2, 3
    drawn = list(itertools.combinations(range(gallery), k))
    expected = sum(1 for first in drawn if set(first) & set(range(right))) / len(drawn)
    assert metrics.chance_of_hit(k, gallery, [right]) == pytest.approx(expected)
    assert metrics.chance_of_hit(1, 4, [1, 2]) == pytest.approx(3 / 8)
    assert metrics.chance_of_hit(10, 4, [1]) == 1.0
