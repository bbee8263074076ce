"""Hit rates, class means, precision areas, intervals and tests, against hand-made cases."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as some
from torch import Tensor

from evaclip_model.zeroshot import statistics


def test_mean_per_class_counts_a_rare_class_as_much_as_a_common_one():
    labels = torch.tensor([0, 0, 0, 2])
    correct = torch.tensor([True, True, True, False])
    assert statistics.mean_per_class(correct, labels) == pytest.approx(0.5)


def test_wilson_interval_agrees_with_published_values():
    # Newcombe (1998), Table I: 81/263, 15/148, 0/20 and 1/29, method 3.
    for (hits, n), expected in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0000, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert statistics.wilson_interval(hits, n) == pytest.approx(expected, abs=5e-5)
    assert statistics.wilson_interval(20, 20)[1] == 1.0


def test_captions_of_one_image_do_not_count_as_independent():
    draw = torch.Generator().manual_seed(0)
    per_image = torch.rand(200, generator=draw) < 0.4
    cluster = torch.arange(200).repeat_interleave(5)
    low, high = statistics.percentile_interval(
        statistics.resampled_means(per_image.repeat_interleave(5), cluster)
    )
    share = float(per_image.double().mean())
    naive = statistics.wilson_interval(int(per_image.sum()) * 5, 1000)
    honest = statistics.wilson_interval(int(per_image.sum()), 200)
    assert low < share < high
    assert high - low == pytest.approx(honest[1] - honest[0], rel=0.1)
    assert high - low > 1.8 * (naive[1] - naive[0])


@pytest.mark.parametrize("value", [0.0, 0.6, 1.0])
def test_an_interval_has_a_width_where_every_draw_is_the_same(value: float):
    draws = torch.full((1000,), value, dtype=torch.float64)
    low, high = statistics.design_interval(value, draws, 2)
    assert low <= value <= high
    assert high - low > 0.6
    if value in (0.0, 1.0):
        assert (low, high) == statistics.wilson_interval(int(2 * value), 2)


def test_an_interval_of_single_samples_is_wilsons():
    hits = (torch.arange(400) < 100).double()
    found = statistics.design_interval(0.25, statistics.resampled_means(hits), 400, least=400)
    assert found == pytest.approx(statistics.wilson_interval(100, 400), abs=4e-3)


def test_groups_and_classes_of_unequal_size_count_for_less():
    assert statistics.effective_units(torch.tensor([5, 5, 0, 5])) == pytest.approx(3)
    assert statistics.effective_units(torch.tensor([10, 1, 1])) == pytest.approx(144 / 102)
    assert statistics.effective_samples(torch.tensor([4, 4, 0])) == pytest.approx(8)
    assert statistics.effective_samples(torch.tensor([100, 1])) == pytest.approx(4 / 1.01)


@pytest.mark.parametrize(("n", "share"), [(2, 0.5), (10, 0.99), (100, 0.01), (100, 0.99)])
def test_intervals_hold_the_true_share_as_often_as_they_say(n: int, share: float):
    draw = torch.Generator().manual_seed(7)
    owner = torch.arange(n).repeat_interleave(5)
    images = statistics.effective_units(owner.bincount())
    covered = 0
    for _ in range(100):
        # Three captions in ten follow their image, the others are answered on their own.
        follows = torch.rand(5 * n, generator=draw) < 0.3**0.5
        image = (torch.rand(n, generator=draw) < share)[owner]
        alone = torch.rand(5 * n, generator=draw) < share
        hits = torch.where(follows, image, alone).double()
        low, high = statistics.design_interval(
            *(float(hits.mean()), statistics.resampled_means(hits, owner), images),
            least=images,
            most=5 * n,
        )
        covered += low <= share <= high
    assert covered >= 88


def test_chance_is_the_share_of_all_orders_with_a_hit():
    gallery, right, k = 6, 2, 3
    drawn = list(itertools.combinations(range(gallery), k))
    expected = sum(1 for first in drawn if set(first) & set(range(right))) / len(drawn)
    assert statistics.chance_of_hit(k, gallery, [right]) == pytest.approx(expected)
    assert statistics.chance_of_hit(1, 4, [1, 2]) == pytest.approx(3 / 8)
    assert statistics.chance_of_hit(10, 4, [1]) == 1.0


def test_average_precision_is_the_mean_precision_at_the_right_ones():
    scores = torch.tensor([[0.9], [0.8], [0.7], [0.6]])
    shown = torch.tensor([[True], [False], [True], [False]])
    assert statistics.mean_average_precision(scores, shown) == pytest.approx((1 + 2 / 3) / 2)
    # Recalls of 0 to 0.5 reach a precision of 1, those above 2/3.
    eleven = statistics.mean_average_precision(scores, shown, statistics.eleven_points)
    assert eleven == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_a_recall_of_three_tenths_is_reached_by_three_of_ten():
    shown = torch.tensor([True] * 3 + [False] * 90 + [True] * 7)[:, None]
    scores = -torch.arange(100.0)[:, None]
    eleven = statistics.mean_average_precision(scores, shown, statistics.eleven_points)
    # The recalls of 0, 0.1, 0.2 and 0.3 have a precision of 1; the best above them is 10 of 100.
    assert eleven == pytest.approx((4 * 1 + 7 * 0.1) / 11)


def test_a_class_that_no_image_shows_has_no_average_precision_and_no_say_in_the_mean():
    scores, shown = torch.rand(6, 2), torch.tensor([[True, False]] * 3 + [[False, False]] * 3)
    of_each = statistics.average_precisions(scores, shown)
    assert bool(of_each[1].isnan())
    assert statistics.mean_average_precision(scores, shown) == pytest.approx(float(of_each[0]))


@given(some.data())
@settings(max_examples=60, deadline=None)
def test_average_precision_is_that_of_a_walk_over_thresholds(data: some.DataObject):
    n = data.draw(some.integers(1, 12))
    scores = data.draw(some.lists(some.integers(0, 4), min_size=n, max_size=n))
    shown = data.draw(some.lists(some.booleans(), min_size=n, max_size=n))
    if not any(shown):
        return
    curve, area, recall_before = [], Fraction(0), Fraction(0)
    for threshold in sorted(set(scores), reverse=True):
        above = [truth for score, truth in zip(scores, shown, strict=True) if score >= threshold]
        precision, recall = Fraction(sum(above), len(above)), Fraction(sum(above), sum(shown))
        area += (recall - recall_before) * precision
        recall_before = recall
        curve.append((recall, precision))
    eleven = [max(p for r, p in curve if r >= Fraction(tenth, 10)) for tenth in range(11)]
    columns = torch.tensor(scores, dtype=torch.float32)[:, None], torch.tensor(shown)[:, None]
    assert statistics.mean_average_precision(*columns) == pytest.approx(float(area))
    found = statistics.mean_average_precision(*columns, statistics.eleven_points)
    assert found == pytest.approx(float(sum(eleven) / 11))


@given(some.permutations(range(9)), some.lists(some.integers(0, 2), min_size=9, max_size=9))
def test_the_order_of_images_decides_no_average_precision(order: list[int], scores: list[int]):
    columns = torch.tensor(scores, dtype=torch.float32)[:, None]
    shown = torch.tensor([number % 3 == 0 for number in range(9)])[:, None]
    for ties in ("together", "won", "lost"):
        straight = statistics.average_precisions(columns, shown, ties=ties)
        shuffled = statistics.average_precisions(columns[order], shown[order], ties=ties)
        assert torch.equal(straight, shuffled)


@given(some.lists(some.tuples(some.integers(0, 3), some.booleans()), min_size=1, max_size=9))
def test_ties_that_are_won_and_lost_bound_every_order_of_the_tied(images: list[tuple[int, bool]]):
    shown = torch.tensor([truth for _, truth in images])[:, None]
    if not bool(shown.any()):
        return
    scores = torch.tensor([float(score) for score, _ in images])[:, None]
    lost, won = (
        statistics.mean_average_precision(scores, shown, ties=ties) for ties in ("lost", "won")
    )
    apart = scores - torch.arange(len(images))[:, None] / 100  # some order of those that tie
    one = statistics.mean_average_precision(apart, shown)
    assert lost - 1e-12 <= one <= won + 1e-12


def test_draws_of_a_mean_per_class_are_those_of_drawing_samples():
    draw = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 7, (400,), generator=draw) ** 2 % 7
    correct = torch.rand(400, generator=draw) < 0.3 + labels / 12
    drawn = statistics.resampled_class_means(correct, labels)
    naive = []
    for _ in range(1000):
        chosen = torch.randint(0, 400, (400,), generator=draw)
        naive.append(statistics.mean_per_class(correct[chosen], labels[chosen]))
    expected = torch.tensor(naive, dtype=torch.float64)
    assert float(drawn.mean()) == pytest.approx(float(expected.mean()), abs=2e-3)
    assert float(drawn.std()) == pytest.approx(float(expected.std()), rel=0.1)


@pytest.mark.parametrize("curve", [statistics.area_under_curve, statistics.eleven_points])
def test_draws_of_a_mean_average_precision_are_those_of_the_images_drawn(curve: statistics.Curve):
    draw = torch.Generator().manual_seed(4)
    scores = torch.randint(0, 30, (60, 4), generator=draw).float()
    shown = torch.rand(60, 4, generator=draw) < 0.2
    drawn = statistics.resampled_precisions(scores, shown, curve)
    numbers = np.random.default_rng(statistics.BOOTSTRAP_SEED)
    for number in range(20):
        chosen = torch.from_numpy(numbers.integers(0, 60, 60))
        again = statistics.mean_average_precision(scores[chosen], shown[chosen], curve)
        assert float(drawn[number]) == pytest.approx(again, abs=1e-12)


def test_how_many_draws_are_held_at_once_changes_no_draw(monkeypatch: pytest.MonkeyPatch):
    scores, shown = torch.rand(50, 3), torch.rand(50, 3) < 0.3
    labels = torch.arange(50) % 9

    def draws() -> list[Tensor]:
        return [
            statistics.resampled_precisions(scores, shown),
            statistics.resampled_class_means(shown[:, 0], labels),
            statistics.resampled_means(shown[:, 0], labels),
        ]

    whole = draws()
    monkeypatch.setattr(statistics, "_WEIGHTS_AT_ONCE", 97)
    assert all(map(torch.equal, whole, draws()))


def test_mcnemars_test_agrees_with_published_values():
    # Fagerland, Lydersen and Laake (2013): 1 and 7 children of 21 changed.
    assert round(statistics.test_mcnemar(1, 7), 3) == 0.039


@given(some.integers(0, 40), some.integers(0, 40))
def test_mcnemars_test_is_the_binomial_one(only_a: int, only_b: int):
    n, fewer = only_a + only_b, min(only_a, only_b)
    tail = Fraction(sum(math.comb(n, i) for i in range(fewer + 1)), 2**n)
    observed = Fraction(math.comb(n, fewer), 2**n)
    found = statistics.test_mcnemar(only_a, only_b)
    assert found == pytest.approx(float(min(Fraction(1), 2 * tail - observed)))
    assert found == statistics.test_mcnemar(only_b, only_a)


def test_mcnemars_test_takes_as_many_samples_as_imagenet_has():
    assert 0.9 < statistics.test_mcnemar(25_000, 25_010) < 1
    assert statistics.test_mcnemar(24_000, 26_000) < 1e-15
    assert statistics.test_mcnemar(0, 0) == 1.0


@given(some.integers(0, 300), some.integers(0, 300), some.integers(0, 400))
def test_a_matched_interval_holds_the_difference_and_is_never_a_point(
    only_a: int, only_b: int, same: int
):
    n = only_a + only_b + same
    low, high = statistics.matched_interval(only_a, only_b, n)
    assert low < high
    if n:
        assert low <= (only_a - only_b) / n * n / (n + 2) <= high
    assert statistics.matched_interval(only_b, only_a, n) == pytest.approx((-high, -low))


def test_draws_on_both_sides_of_none_are_no_evidence_and_draws_on_one_are_limited_evidence():
    assert statistics.two_sided_p(torch.tensor([-1.0, 1.0, -1.0, 1.0])) == 1.0
    assert statistics.two_sided_p(torch.ones(999)) == pytest.approx(2 / 1000)
    assert statistics.two_sided_p(torch.zeros(999)) == 1.0
