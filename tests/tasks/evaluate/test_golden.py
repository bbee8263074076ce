"""A fixed evaluation gives the figures and the report it gave before the metrics were one list.

`python -m tests.tasks.evaluate.test_golden` writes the golden files anew, after a change that is
meant to be seen.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tasks.evaluate.report.charts import read_curve
from tasks.evaluate.report.write_reports import write_reports
from tests.tasks.evaluate.fixed_evaluation import fixed_evaluation

GOLDEN = Path(__file__).parents[2] / "golden" / "evaluation"
TEXTS = ("report.md", "summary.md", "figures.csv")
RESULTS = "results.json"
FEW_CLASSES = 20
"""Up to so many, the golden file has a set's figures class by class."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the reports of the fixed evaluation, and of its results."""
    return write_fixed_evaluation(tmp_path_factory.mktemp("golden"))


def write_fixed_evaluation(folder: Path) -> Path:
    with tempfile.TemporaryDirectory() as pictures:
        results, scored, curve = fixed_evaluation(Path(pictures))
        write_reports(folder, results, scored, [read_curve(curve)])
    for by_model in results["results"].values():
        for figures in by_model.values():
            if len(figures.get("per_class", ())) > FEW_CLASSES:
                figures["per_class"] = f"{len(figures['per_class'])} classes"
    (folder / RESULTS).write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return folder


@pytest.mark.parametrize("name", TEXTS)
def test_a_report_of_the_same_answers_is_the_same_text(name: str, written: Path):
    assert (written / name).read_text() == (GOLDEN / name).read_text()


def test_results_of_the_same_answers_are_the_same_figures_in_the_same_order(written: Path):
    found, expected = (json.loads((folder / RESULTS).read_text()) for folder in (written, GOLDEN))
    assert _flat(found) == pytest.approx(_flat(expected), rel=1e-9)
    assert [*_flat(found)] == [*_flat(expected)]


def _flat(value: Any, place: str = "") -> dict[str, Any]:
    """Every leaf of JSON by the path that leads to it, in order; texts as their own keys."""
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list):
        items = dict(enumerate(value)).items()
    elif isinstance(value, str) or value is None:
        return {f"{place}={value}": 0}
    else:
        return {place: value}
    flat: dict[str, Any] = {}
    for key, inner in items:
        flat |= _flat(inner, f"{place}/{key}")
    return flat


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        write_fixed_evaluation(Path(made))
        GOLDEN.mkdir(parents=True, exist_ok=True)
        for name in (*TEXTS, RESULTS):
            (GOLDEN / name).write_text((Path(made) / name).read_text())
