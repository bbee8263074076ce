"""The file of every answer: figures computed from it are those of the results, of every kind."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from tasks.evaluate.config import EvaluateConfig
from tasks.evaluate.evaluate import evaluate_models
from tasks.progress import report_nothing

LONG = "a very long caption " * 20
TEMPLATES = "zeroshot_classification_templates"
KINDS = {
    **{"colours": "classification", "several": "multilabel"},
    **{"discs": "retrieval", "long": "retrieval"},
}


@pytest.fixture
def evaluated(
    sets: Mapping[str, Path],
    saved_model: Callable[[int], Path],
    write: Callable[..., Path],
    disc: Callable[[str, int], bytes],
    tmp_path: Path,
) -> Path:
    """Folder of an evaluation of two models on a set of every kind."""
    long, several = [], []
    for number in range(6):
        image = disc("red" if number % 2 else "blue", number)
        labels = io.BytesIO()
        np.save(labels, np.array([1, number % 2, 0]))
        long += [(f"s{number}.webp", image)]
        long += [(f"s{number}.txt", (LONG if number == 4 else f"disc {number}").encode())]
        several += [(f"s{number}.webp", image), (f"s{number}.npy", labels.getvalue())]
    words = {"classnames": "disc\nred\ngreen\n"} | {TEMPLATES: "a {c}.\n"}
    given = {
        **sets,
        "long": write(tmp_path / "long", [long], dataset_type="retrieval\n"),
        "several": write(tmp_path / "several", [several], dataset_type="multilabel\n", **words),
    }
    config = EvaluateConfig.from_mapping(
        {"sets": [{"name": name, "folder": "-", "kind": KINDS[name]} for name in given]},
        where="here",
    )
    models = {name: saved_model(seed) for name, seed in (("one", 1), ("two", 2))}
    evaluate_models(config, models, given, [], tmp_path / "out", report_nothing)
    return tmp_path / "out"


def test_figures_can_be_computed_from_the_answers_and_cut_captions_are_said(evaluated: Path):
    results = json.loads((evaluated / "results.json").read_text())["results"]
    rows = pandas.read_parquet(evaluated / "answers.parquet")
    assert set(rows["set"]) == set(KINDS)
    several = rows[rows["set"] == "several"]
    assert several["rank"].isna().all() and [*several["label"].iloc[1]] == [0, 1]
    ranked = rows[rows["set"] != "several"]
    for (name, model, direction), found in ranked.groupby(
        ["set", "model", "direction"], observed=True
    ):
        figure = {"image → class": "top1", "image → text": "image_to_text_r1"}.get(
            direction, "text_to_image_r1"
        )
        right = [row.answers[0] in row.label for row in found.itertuples()]
        assert sum(right) / len(right) == results[name][model][figure]
        assert [rank == 0 for rank in found["rank"]] == right
        assert all((scores[:-1] >= scores[1:] - 1e-6).all() for scores in found["scores"])
    colours = rows[rows["set"] == "colours"]
    assert len(colours) == 2 * results["colours"]["one"]["n"]
    assert colours["names"].iloc[0][0].endswith("disc") and colours["query"].isna().all()

    _check_cut(evaluated, json.loads((evaluated / "results.json").read_text()))


def _check_cut(evaluated: Path, results: dict[str, Any]) -> None:
    """Captions that are cut are counted and said."""
    assert [results["results"][name]["one"]["cut"] for name in ("discs", "long")] == [0, 1]
    said = "one does not see the end of 1 of 6 captions: its context is shorter"
    assert said in results["sets"]["long"]["warnings"]
    assert not [one for one in results["sets"]["discs"]["warnings"] if "does not see" in one]
    assert said in (evaluated / "report.html").read_text()
