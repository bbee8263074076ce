"""Warnings: what they catch, and what they leave in peace."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from evaclip_model.zeroshot.exact_ranks import rank_classes
from evaclip_model.zeroshot.set_layout import Span
from tasks.evaluate.metrics.compute import chance_levels, compute_figures
from tasks.evaluate.metrics.scored import Scored
from tasks.evaluate.results import permuted_classes, warnings_of
from tasks.evaluate.sets.published_layout import EvalSample, EvalSet

CLASSES, EACH = 10, 20


def scored(answers: list[int], names: list[str] | None = None) -> Scored:
    """A set of ten classes, its images in the order of their classes, answered like this."""
    span = Span(Path("x"), 0, 0)
    labels = [number // EACH for number in range(CLASSES * EACH)]
    samples = tuple(EvalSample(str(n), span, label) for n, label in enumerate(labels))
    names = names or [f"class {number}" for number in range(CLASSES)]
    evalset = EvalSet("s", "classification", samples, tuple(names), ("{c}",), "f")
    images = torch.eye(CLASSES)[answers]
    return Scored(evalset, classes=rank_classes(images, torch.eye(CLASSES), torch.tensor(labels)))


def told(one: Scored) -> list[str]:
    return warnings_of(one.evalset, one, compute_figures(one), chance_levels(one.evalset))


def right() -> list[int]:
    return [number // EACH for number in range(CLASSES * EACH)]


def test_names_in_another_order_than_labels_are_noticed():
    order = [3, 1, 0, 2, 4, 6, 5, 7, 9, 8]
    one = scored([order[label] for label in right()])
    assert permuted_classes(one.evalset, one) == {
        f"class {label}": f"class {said}" for label, said in enumerate(order) if label != said
    }
    assert any("as if names and labels were in different orders" in text for text in told(one))


@pytest.mark.parametrize("correct", [0.0, 0.1, 0.5, 0.9])
def test_a_poor_model_is_not_taken_for_a_wrong_order(correct: float):
    draw = random.Random(0)
    answers = [label if draw.random() < correct else draw.randrange(CLASSES) for label in right()]
    assert permuted_classes(scored(answers).evalset, scored(answers)) == {}


def test_a_model_that_always_says_the_same_is_not_taken_for_a_wrong_order():
    one = scored([0] * CLASSES * EACH)
    assert permuted_classes(one.evalset, one) == {}
    assert any("top1 is not above chance" in text for text in told(one))


def test_two_classes_that_a_model_confuses_are_not_taken_for_a_wrong_order():
    one = scored([{0: 1, 1: 0}.get(label, label) for label in right()])
    assert permuted_classes(one.evalset, one) == {}


def test_duplicate_names_are_told():
    names = [f"class {number // 2}" for number in range(CLASSES)]
    assert "5 class names occur more than once: their images tie exactly" in told(
        scored(right(), names)
    )


def test_a_good_model_gives_no_reason_to_doubt():
    assert told(scored(right())) == []
