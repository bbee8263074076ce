"""Metrics of a user's own, from a Python file that the recipe names, and every mistake in one."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from evaclip_model.errors import InputError
from flows.graph.graph import evaluate_step
from tasks.evaluate.config import EvaluateConfig
from tasks.evaluate.evaluate import evaluate_models
from tasks.evaluate.metrics.compute import load_metrics
from tasks.progress import report_nothing

TOP2 = """
from tasks.evaluate.metrics.metric import HitShare

METRICS = [
    HitShare(
        name="top2",
        title="first or second",
        kind="classification",
        per_sample=lambda scored, ties: {values},
        chance=lambda evalset: 2 / len(evalset.classnames),
    )
]
"""


@pytest.fixture
def evaluate(
    sets: Mapping[str, Path], saved_model: Callable[[int], Path], tmp_path: Path
) -> Callable[[str], Path]:
    """Evaluate a model on four colours with a metric whose values are an expression."""

    def run(values: str) -> Path:
        (tmp_path / "mine.py").write_text(TOP2.format(values=values))
        kinds = {"colours": "classification", "discs": "retrieval"}
        entries = [{"name": name, "folder": "-", "kind": kind} for name, kind in kinds.items()]
        given = {"sets": entries, "metrics": [str(tmp_path / "mine.py")]}
        config = EvaluateConfig.from_mapping(given, where="here")
        models = {"one": saved_model(1), "two": saved_model(2)}
        evaluate_models(config, models, sets, [], tmp_path / "out", report_nothing)
        return tmp_path / "out"

    return run


def test_a_metric_of_ones_own_has_all_that_the_others_have(evaluate: Callable[[str], Path]):
    out = evaluate("scored.classes.ranks < 2")
    results = json.loads((out / "results.json").read_text())
    figures = results["results"]["colours"]["one"]
    assert figures["top1"] <= figures["top2"] <= figures["top5"]
    low, high = figures["intervals"]["top2"]
    assert low < figures["top2"] < high or figures["top2"] in (0, 1)
    assert results["chance"]["colours"]["top2"] == 0.5
    assert "top2" in results["paired"]["colours"]["two"]
    assert "top2" not in results["results"]["discs"]["one"]
    assert "first or second" in (out / "report.md").read_text()
    rows = csv.DictReader((out / "figures.csv").read_text().splitlines())
    first = next(row for row in rows if row["metric"] == "top2")
    assert first["value"] == str(figures["top2"])


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ("1 / 0", r"'top2' on set 'colours' raises ZeroDivisionError: division by zero"),
        ("scored.classes.top", r"returns \(12, 4\), not a tensor \[12\]: a value a question"),
        ("0.5", r"returns float, not a tensor \[12\]"),
        ("scored.classes.ranks / 0", "returns values that are not finite"),
    ],
)
def test_what_is_wrong_with_its_values_is_one_sentence(
    values: str, complaint: str, evaluate: Callable[[str], Path]
):
    with pytest.raises(InputError, match=complaint):
        evaluate(values)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("import nothing_of_that_name", "cannot be run: ModuleNotFoundError"),
        ("METRICS = []", "defines no METRICS"),
        ("METRICS = [lambda scored: 1]", "METRICS holds <function"),
        (TOP2.format(values="0").replace("top2", "top1"), "there is a metric 'top1'"),
    ],
)
def test_a_file_without_metrics_is_one_sentence(content: str, complaint: str, tmp_path: Path):
    (tmp_path / "mine.py").write_text(content)
    with pytest.raises(InputError, match=complaint):
        load_metrics([str(tmp_path / "mine.py")])


def test_the_content_of_the_file_is_part_of_the_digest(tmp_path: Path):
    path = tmp_path / "mine.py"
    given = {"sets": [{"name": "mnist"}], "metrics": [str(path)]}
    config = EvaluateConfig.from_mapping(given, where="here")

    def digest() -> str:
        return evaluate_step(tmp_path, config, {}, {}, dict).digest

    with pytest.raises(InputError, match=r"evaluate.metrics: .*mine.py is not a file"):
        digest()
    path.write_text("METRICS = []")
    first = digest()
    path.write_text("METRICS = [] # other")
    assert digest() != first
