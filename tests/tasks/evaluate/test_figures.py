"""Figures of every kind of set, from answers made up by hand."""

from __future__ import annotations

import pytest
import torch

from evaclip_model.zeroshot.exact_ranks import Ranking
from tasks.evaluate.metrics.compute import chance_levels, compute_figures
from tasks.evaluate.metrics.scored import Scored, positives_of, score_set
from tasks.evaluate.sets.set_registry import known_sets
from tests.tasks.evaluate.answers import answered, caption_set, class_set, label_set

NAMES = ("cat", "dog", "fox", "owl", "rat", "yak")


def units(rows: int, width: int, seed: int) -> torch.Tensor:
    drawn = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=1)


@pytest.mark.parametrize("evalset", [
    class_set([0, 1, 2, 3, 4, 5, 0], NAMES),
    class_set([0, 1, 2, 3, 4, 5, 0], NAMES, known_sets()["kinetics400"]),
    label_set([[0], [1, 2], [], [3, 4, 5], [0], [1]], NAMES),
    caption_set([5, 5, 6, 5, 7, 5, 5, 5, 5, 5, 5]),
], ids=["classes", "kinetics", "labels", "captions"])  # fmt: skip
def test_every_figure_has_an_interval_bounds_and_a_chance_level(evalset):
    texts = len(evalset.classnames) or sum(len(one.captions) for one in evalset.samples)
    figures = compute_figures(score_set(evalset, units(len(evalset), 8, 0), units(texts, 8, 1)))
    metrics = chance_levels(evalset).keys()
    assert metrics == figures["intervals"].keys() == figures["bounds"].keys()
    assert figures["n"] == len(evalset)
    for metric in metrics:
        low, high = figures["intervals"][metric]
        lost, won = figures["bounds"][metric]
        assert 0 <= low <= high <= 1
        assert lost <= figures[metric] <= won


def test_classes_are_counted_one_by_one_and_the_commonest_mistakes_named():
    evalset = class_set([0, 0, 0, 1, 1, 5], NAMES)
    figures = compute_figures(Scored(evalset, classes=answered(evalset, [0, 1, 1, 1, 2, 5])))
    assert (figures["top1"], figures["mean_per_class"]) == (0.5, pytest.approx(11 / 18))
    assert figures["confusions"] == [["cat", "dog", 2], ["dog", "fox", 1]]
    of_cats, _, of_foxes = figures["per_class"][:3]
    assert of_cats == {"name": "cat", "n": 3, "correct": 1, "share": pytest.approx(1 / 3)}
    assert of_foxes == {"name": "fox", "n": 0, "correct": 0, "share": None}


def test_kinetics_has_the_mean_of_top_1_and_top_5_and_other_sets_do_not():
    labels, said = [0, 1, 2, 3, 5], [0, 1, 0, 0, 0]
    others = compute_figures(
        Scored(class_set(labels, NAMES), answered(class_set(labels, NAMES), said))
    )
    evalset = class_set(labels, NAMES, known_sets()["kinetics700"])
    figures = compute_figures(Scored(evalset, classes=answered(evalset, said)))
    assert "kinetics_mean" not in others
    assert (figures["top1"], figures["top5"]) == (0.4, 0.8)  # the last class is sixth of ties
    assert figures["kinetics_mean"] == pytest.approx(0.6)
    assert figures["bounds"]["kinetics_mean"] == (pytest.approx(0.4), pytest.approx(0.7))
    low, high = figures["intervals"]["kinetics_mean"]
    assert low < 0.6 < high


def test_several_classes_an_image_have_two_kinds_of_average_precision():
    evalset = label_set([[0], [0, 1], [1], []], ("cat", "dog", "fox"))
    scores = torch.tensor([[4.0, 4, 0], [2, 3, 0], [3, 2, 0], [1, 1, 0]])
    figures = compute_figures(Scored(evalset, scores=scores))
    assert positives_of(evalset).sum() == figures["positives"] == 4
    cat, dog = (1 + 2 / 3) / 2, (1 / 2 + 2 / 3) / 2
    assert figures["map"] == pytest.approx((cat + dog) / 2)
    assert figures["map_11pt"] == pytest.approx(((6 + 5 * 2 / 3) / 11 + 2 / 3) / 2)
    assert [one["average_precision"] for one in figures["per_class"]] == [
        pytest.approx(cat),
        pytest.approx(dog),
        None,
    ]
    assert chance_levels(evalset)["map"] == 0.5
    assert figures["tied"] == 0


def test_images_that_tie_with_one_of_the_other_truth_are_counted_and_bound_the_figure():
    evalset = label_set([[0], [], [0], []], ("cat",))
    figures = compute_figures(Scored(evalset, scores=torch.tensor([[2.0], [2], [1], [0]])))
    assert figures["tied"] == 2
    assert figures["map"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert figures["bounds"]["map"] == (pytest.approx((1 / 2 + 2 / 3) / 2), pytest.approx(5 / 6))


def test_a_sample_that_was_not_ranked_is_an_error_and_not_a_smaller_set():
    evalset = class_set([0, 1, 2], NAMES)
    whole = answered(evalset, [0, 1, 2])
    with pytest.raises(RuntimeError, match="2 queries ranked, its index holds 3"):
        compute_figures(Scored(evalset, classes=whole.select_queries(torch.tensor([0, 1]))))
    with pytest.raises(RuntimeError, match="was not ranked"):
        compute_figures(Scored(evalset))


def test_captions_of_one_image_widen_the_interval():
    evalset = caption_set([5] * 200)
    right = (torch.rand(200, generator=torch.Generator().manual_seed(0)) < 0.4).repeat_interleave(5)
    ranks = (~right).long() * 20
    ranking = Ranking(ranks, ranks, ranks, ranks < 0, ranks[:, None])
    figures = compute_figures(
        Scored(evalset, texts=ranking.select_queries(torch.arange(200)), images=ranking)
    )
    low, high = figures["intervals"]["text_to_image_r1"]
    assert 0.1 < high - low < 0.17  # of 1,000 independent ones: 0.06
