"""The list of metrics: a metric is one entry of it, and everything else follows."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from evaclip_model.zeroshot.exact_ranks import Ranking
from tasks.evaluate.metrics import metric as metrics
from tasks.evaluate.metrics.compute import chance_levels, compare_models, compute_figures
from tasks.evaluate.metrics.metric import (
    METRICS,
    HitShare,
    SampleMean,
    define_top,
    headlines_of,
    judged_metrics,
)
from tasks.evaluate.metrics.scored import Scored
from tasks.evaluate.report.write_reports import write_reports
from tasks.evaluate.results import counts_of
from tasks.evaluate.sets.set_registry import known_sets
from tests.tasks.evaluate.answers import class_set
from tests.tasks.evaluate.fixed_evaluation import fixed_evaluation

RANKS = torch.tensor([0, 3, 7, 20])
KINETICS = class_set([0, 1, 2, 3], [f"class {n}" for n in range(30)], known_sets()["kinetics400"])
IN_FIRST_20 = HitShare(
    name="in_first_20",
    title="in the first 20",
    kind="classification",
    per_sample=lambda scored, ties: scored.classes.ranks < 20,
)
"""A metric of which nobody has said what chance reaches."""


def scored(ranks: torch.Tensor = RANKS) -> Scored:
    return Scored(KINETICS, classes=Ranking(ranks, ranks, ranks, ranks < 0, ranks[:, None]))


def test_names_of_metrics_differ() -> None:
    names = [one.name for one in METRICS]
    assert len(set(names)) == len(names)


def test_top_10_is_one_entry_and_changes_nothing_of_the_mean_of_top_1_and_top_5(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = compute_figures(scored())
    monkeypatch.setattr(metrics, "METRICS", (*METRICS, define_top(10)))
    after = compute_figures(scored())
    assert after["top10"] == 0.75
    assert chance_levels(KINETICS)["top10"] == pytest.approx(10 / 30)
    assert after["intervals"]["top10"][0] < 0.75 < after["intervals"]["top10"][1]
    assert compare_models(scored(), scored(RANKS + 5))["top10"].test == "McNemar, mid-p"
    mean = next(one for one in METRICS if one.name == "kinetics_mean")
    assert isinstance(mean, SampleMean)
    assert mean.per_sample(scored(), "together").tolist() == [1, 0.5, 0, 0]
    assert after["kinetics_mean"] == before["kinetics_mean"] == 0.375
    for part in ("intervals", "bounds"):
        del after[part]["top10"]
    del after["top10"]
    assert after == before


def test_a_metric_without_a_chance_level_is_shown_in_every_report_and_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(metrics, "METRICS", (*METRICS, IN_FIRST_20))
    results, answers, _ = fixed_evaluation(tmp_path)
    assert "in_first_20" not in results["chance"]["kinetics400"]
    page, markdown, _, table = (
        path.read_text() for path in write_reports(tmp_path, results, answers)
    )
    assert page.count("in the first 20") >= 3 and markdown.count("in the first 20") == 3
    rows = [row for row in csv.DictReader(table.splitlines()) if row["metric"] == "in_first_20"]
    assert {row["set"] for row in rows} == {"cifar10", "kinetics400", "mine"}
    assert {row["chance"] for row in rows} == {""} and all(row["low"] for row in rows)
    counts = counts_of(results)
    assert counts["mine.in_first_20"] == counts["mine.champion.in_first_20"] == 1
    assert "mine.chance.in_first_20" not in counts


def test_a_set_that_the_registry_does_not_have_shows_first_what_others_of_its_kind_do() -> None:
    first = {
        kind: [one.name for one in headlines_of(kind, None)]
        for kind in ("classification", "multilabel", "retrieval")
    }
    assert first == {
        "classification": ["top1"],
        "multilabel": ["map"],
        "retrieval": ["text_to_image_r1", "image_to_text_r1"],
    }
    assert [one.name for one in headlines_of("classification", "kinetics_mean")] == [
        "kinetics_mean"
    ]


def test_the_gate_judges_what_is_shown_first_of_some_set() -> None:
    assert set(judged_metrics()) == {
        *("top1", "kinetics_mean", "map", "image_to_text_r1", "text_to_image_r1"),
        *("real_top1", "accuracy", "group_score", "jaccard"),
    }
