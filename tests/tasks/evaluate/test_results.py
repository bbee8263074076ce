"""What results say beside the figures: the paper's, and whether ours are those."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.encoders.open_models import Identity
from tasks.evaluate.config import EvaluateConfig
from tasks.evaluate.metrics.scored import Scored
from tasks.evaluate.results import counts_of, results_of
from tasks.evaluate.sets.set_registry import known_sets
from tests.tasks.evaluate.answers import answered, class_set

RELEASED = Identity(
    digest="0" * 16,
    text_digest="1" * 16,
    transform_digest="2" * 16,
    architecture="EVA02-CLIP-B-16 at 224 px",
    params=149_690_000,
    gflops=35.0,
    source="open_clip:EVA02-B-16/merged2b_s8b_b131k",
    preprocessing={},
)


def results(share: float, split: str = "") -> dict[str, Any]:
    """Of the released B/16 and another model on Caltech-101, which it answers so well."""
    known = known_sets()["caltech101"]
    assert known.classes is not None and known.n is not None
    labels = [number % known.classes for number in range(known.n)]
    evalset = class_set(labels, [f"class {n}" for n in range(known.classes)], known)
    right = round(share * known.n)
    said = [label if n < right else (label + 1) % 102 for n, label in enumerate(labels)]
    scored = {"released": said, "other": [(label + 1) % 102 for label in labels]}
    config = EvaluateConfig.from_mapping(
        {"sets": [{"name": "caltech101", "split": split}, {"name": "mnist"}]}, where="here"
    )
    other = RELEASED.model_copy(update={"source": "runs/mine"})
    return results_of(
        config,
        {"released": RELEASED, "other": other},
        {"caltech101": evalset, "mnist": class_set([0], ["0"], known_sets()["mnist"])},
        {"caltech101": {n: Scored(evalset, answered(evalset, one)) for n, one in scored.items()}},
        {"mnist": "an image cannot be decoded"},
        {},
    )


@pytest.mark.parametrize(
    ("split", "share", "expected"),
    [
        ("", 0.863, "not comparable"),
        ("VTAB's test split", 0.863, "reproduced"),
        ("VTAB's test split", 0.7, "differs"),
    ],
)
def test_a_split_that_the_recipe_states_makes_a_figure_comparable(
    split: str, share: float, expected: str
) -> None:
    found = results(share, split)
    assert found["paper"]["caltech101"]["released"]["top1"]["verdict"] == expected
    assert found["sets"]["caltech101"]["split"] == "VTAB's test split"  # stated, or the registry's
    other = found["paper"]["caltech101"]["other"]["top1"]
    assert other["verdict"] == "not comparable" and "not its weights" in other["reason"]


def test_a_set_that_failed_has_a_reason_and_is_missing_from_averages() -> None:
    found = results(0.5)
    assert found["failed"] == {"mnist": "an image cannot be decoded"}
    assert "mnist" not in found["results"]
    average = found["averages"]["2"]["released"]
    assert average["value"] is None and "mnist" in average["missing"]
    assert average["intersection_value"] == pytest.approx(50, abs=0.01)
    assert average["intersection_reference"] == 86.3


def test_totals_are_of_the_subject_the_other_models_and_chance() -> None:
    counts = counts_of(results(0.5))
    assert counts["caltech101.top1"] == pytest.approx(0.5, abs=1e-4)
    assert counts["caltech101.other.top1"] == 0
    assert counts["caltech101.chance.top1"] == pytest.approx(1 / 102)
