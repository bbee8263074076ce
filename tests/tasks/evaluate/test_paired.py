"""Two models on the same samples: what is different, what is chance, what cannot be paired."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from evaclip_model.errors import InputError
from evaclip_model.zeroshot.exact_ranks import Ranking
from tasks.evaluate.metrics.compute import chance_levels, compare_models, compute_figures
from tasks.evaluate.metrics.scored import Scored
from tasks.evaluate.sets.set_registry import known_sets
from tests.tasks.evaluate.answers import answered, caption_set, class_set, label_set

NAMES = tuple(f"class {number}" for number in range(10))
N = 600


def of_ranks(ranks: torch.Tensor) -> Ranking:
    return Ranking(ranks, ranks, ranks, ranks < 0, ranks[:, None])


def models(seed: int, better: float, known: str = "kinetics400") -> tuple[Scored, Scored]:
    """Two models on classes, the first right in `better` more of the cases."""
    draw = torch.Generator().manual_seed(seed)
    evalset = class_set((torch.arange(N) % 10).tolist(), NAMES, known_sets()[known])
    chance = torch.rand(N, generator=draw)
    of_each = []
    for share in (0.5 + better, 0.5):
        wrong = chance + torch.rand(N, generator=draw) / 5 > share + 0.1
        ranks = torch.where(wrong, torch.randint(1, 10, (N,), generator=draw), 0)
        of_each.append(Scored(evalset, classes=of_ranks(ranks)))
    return of_each[0], of_each[1]


def test_what_differs_is_every_figure_of_the_set_by_the_difference_of_the_two():
    a, b = models(0, 0.1)
    found, ours, theirs = compare_models(a, b), compute_figures(a), compute_figures(b)
    assert found.keys() == chance_levels(a.evalset).keys()
    for metric, one in found.items():
        assert one.difference == pytest.approx(ours[metric] - theirs[metric])
        assert one.interval[0] < one.difference < one.interval[1]
    assert found["top1"].test == "McNemar, mid-p" and found["top1"].p < 0.001
    assert found["mean_per_class"].test == "paired bootstrap" and found["mean_per_class"].p < 0.01
    only_a, only_b = found["top1"].only_a, found["top1"].only_b
    assert (only_a - only_b) / N == pytest.approx(found["top1"].difference)


def test_the_other_way_round_all_has_the_other_sign():
    a, b = models(1, 0.05)
    there, back = compare_models(a, b), compare_models(b, a)
    for metric, one in there.items():
        assert back[metric].difference == pytest.approx(-one.difference)
        assert (back[metric].only_a, back[metric].only_b) == (one.only_b, one.only_a)
        assert back[metric].p == pytest.approx(one.p, abs=0.05)


def test_a_model_beside_itself_differs_by_nothing_and_that_is_no_evidence():
    a, _ = models(2, 0.0)
    for one in compare_models(a, a).values():
        assert (one.difference, one.p) == (0.0, 1.0)


def test_equally_good_models_are_rarely_told_apart():
    told = [compare_models(*models(seed, 0.0))["top1"].p < 0.05 for seed in range(60)]
    assert sum(told) <= 8  # 3 expected; 9 or more once in 250 times


def test_paired_answers_tell_apart_what_two_intervals_do_not():
    a, b = models(3, 0.04)
    low, _ = compute_figures(a)["intervals"]["top1"]
    _, high = compute_figures(b)["intervals"]["top1"]
    assert low < high and compare_models(a, b)["top1"].p < 0.05


def test_captions_are_compared_image_by_image_and_images_one_by_one():
    draw = torch.Generator().manual_seed(0)
    evalset = caption_set([5] * 80)
    scored = []
    for share in (0.6, 0.5):
        per_image = torch.rand(80, generator=draw) > share
        ranks = per_image.long() * 20
        images = of_ranks(ranks.repeat_interleave(5))
        scored.append(Scored(evalset, texts=of_ranks(ranks), images=images))
    found = compare_models(*scored)
    assert found.keys() == chance_levels(evalset).keys()
    to_text, to_image = found["image_to_text_r1"], found["text_to_image_r1"]
    assert (to_text.test, to_image.test) == ("McNemar, mid-p", "paired bootstrap")
    assert to_image.only_a == 5 * to_text.only_a
    width = [one.interval[1] - one.interval[0] for one in (to_text, to_image)]
    assert width[1] == pytest.approx(width[0], rel=0.15)  # five captions are one image


def test_average_precision_is_compared_on_the_same_draws():
    draw = torch.Generator().manual_seed(0)
    shown = torch.rand(200, 4, generator=draw) < 0.3
    evalset = label_set([row.nonzero().flatten().tolist() for row in shown], NAMES[:4])
    noise = torch.randn(200, 4, generator=draw)
    a = Scored(evalset, scores=shown * 1.2 + noise)
    b = Scored(evalset, scores=shown * 1.0 + noise)
    found = compare_models(a, b)["map"]
    low, high = compute_figures(a)["intervals"]["map"]
    assert found.difference == pytest.approx(compute_figures(a)["map"] - compute_figures(b)["map"])
    assert found.interval[1] - found.interval[0] < (high - low) / 2
    assert found.p < 0.01 and found.only_a is None


def test_answers_to_different_images_are_not_compared():
    a, b = models(4, 0.0)
    other = replace(b, evalset=replace(b.evalset, fingerprint="other"))
    with pytest.raises(InputError, match="not evaluated on the same images"):
        compare_models(a, other)


def test_a_set_that_was_not_ranked_is_an_error():
    evalset = class_set([0], NAMES)
    with pytest.raises(RuntimeError, match="was not ranked"):
        compare_models(Scored(evalset), Scored(evalset, classes=answered(evalset, [0])))
