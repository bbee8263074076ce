"""One set of every kind and metric, in its published layout, through the engine to the report.

All 33 go the same way in `make dry-run-eval`, which takes minutes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.artifacts.artifact import Made
from tasks.evaluate.config import EvaluateConfig
from tasks.evaluate.evaluate import evaluate_models
from tasks.evaluate.sets.set_registry import all_sets
from tasks.progress import report_nothing
from tests.tasks.evaluate.all_sets import write_all_sets

KINDS = ("mnist", "pcam", "kinetics400", "flickr30k", "voc2007-multilabel")


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, saved_model: Callable[[int], Path]
) -> tuple[Made, Path]:
    folder = tmp_path_factory.mktemp("kinds")
    sets = write_all_sets(folder / "sets", KINDS, images=24)
    entries: list[dict[str, object]] = [{"name": key} for key in KINDS]
    entries[KINDS.index("kinetics400")]["templates"] = ["a video of {c}."]  # 28 would take long
    config = EvaluateConfig.from_mapping({"sets": entries, "title": "Every kind"}, where="here")
    (folder / "out").mkdir()
    models = {"trained": saved_model(1), "untrained": saved_model(2)}
    return evaluate_models(config, models, sets, [], folder / "out", report_nothing), folder / "out"


def test_every_kind_has_the_metric_of_the_paper(made: tuple[Made, Path]):
    results = json.loads((made[1] / "results.json").read_text())
    wanted = {
        "top1": ["top1"],
        "kinetics_mean": ["kinetics_mean"],
        "map": ["map", "map_11pt"],
        "retrieval": ["text_to_image_r1", "image_to_text_r10"],
    }
    for key in KINDS:
        figures = results["results"][key]["trained"]
        assert figures["n"] == 24
        for metric in wanted[all_sets()[key].metric]:
            assert 0 <= figures[metric] <= 1 and metric in figures["intervals"]
    assert set(results["paired"]) == set(KINDS)
    assert results["averages"]["2"]["trained"]["value"] is None


def test_the_artifact_is_figures_and_reports(made: tuple[Made, Path]):
    names = {path.name for path in made[0].files}
    assert names == {
        "results.json",
        "answers.parquet",
        "report.html",
        "report.md",
        "summary.md",
        "figures.csv",
    }
    assert {path.name for path in made[1].iterdir()} == names
    counts = made[0].counts
    assert {"kinetics400.kinetics_mean", "voc2007-multilabel.map", "mnist.chance.top1"} <= set(
        counts
    )


def test_the_page_has_a_section_of_each(made: tuple[Made, Path]):
    page = (made[1] / "report.html").read_text()
    assert {f"set-{key}" for key in KINDS} <= set(re.findall(r'id="([^"]+)"', page))
    assert "25 of its 27 sets not evaluated" in page
    assert "averages" in page and len(page) < 1_000_000
