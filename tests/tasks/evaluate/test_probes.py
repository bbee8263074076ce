"""Linear probe, kNN and few-shot figures: beside scikit-learn's, and through a whole evaluation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from evaclip_model.errors import InputError
from tasks.evaluate.config import EvaluateConfig, ProbeConfig
from tasks.evaluate.evaluate import evaluate_models
from tasks.evaluate.metrics.compute import compute_figures
from tasks.evaluate.metrics.probes import (
    LabelledFeatures,
    answer_probes,
    choose_strength,
    neighbour_votes,
    solve_regression,
)
from tasks.evaluate.metrics.scored import Scored
from tasks.evaluate.sets.convert.convert import Words, convert_imagefolder
from tasks.evaluate.sets.published_layout import open_set, open_train_part
from tasks.progress import report_nothing
from tests.tasks.evaluate.answers import answered, class_set

CLASSES, WIDTH = 5, 16


def labelled(count: int, seed: int, spread: float = 1.0) -> LabelledFeatures:
    """Unit features around one centre a class, which share a large mean, as CLIP's do."""
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(9)) + 3
    noise = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(count) % CLASSES
    values = torch.nn.functional.normalize(centres[labels] + spread * noise, dim=1)
    return LabelledFeatures(values, labels)


@pytest.mark.parametrize("l2", [1e-1, 1e-3, 1e-6])
def test_the_solution_is_scikit_learns_at_a_smaller_gradient(l2: float):
    data, test = labelled(400, 1), labelled(300, 2)
    solved = solve_regression(data.values, data.labels, CLASSES, l2)
    theirs = LogisticRegression(C=1 / (l2 * 400), tol=1e-9, max_iter=20_000)
    theirs.fit(data.values.double().numpy(), data.labels.numpy())
    ours = solved.compute_scores(test.values)
    expected = theirs.predict_proba(test.values.double().numpy())
    assert np.allclose(ours.softmax(dim=1).numpy(), expected, atol=2e-3)
    assert (ours.argmax(dim=1).numpy() == theirs.predict(test.values.double().numpy())).all()
    assert solved.gradient <= 1e-7


def test_neither_order_nor_start_nor_portions_decide_the_solution(monkeypatch):
    data = labelled(200, 3)
    first = solve_regression(data.values, data.labels, CLASSES, 1e-4)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    far = replace(first, weights=first.weights + 5, bias=first.bias - 1)
    monkeypatch.setattr("tasks.evaluate.metrics.probes._ROWS", 7)
    monkeypatch.setattr("tasks.evaluate.metrics.probes._KEPT", 0)
    again = solve_regression(data.values[order], data.labels[order], CLASSES, 1e-4, start=far)
    scores = [one.compute_scores(data.values).softmax(dim=1) for one in (first, again)]
    assert torch.allclose(*scores, atol=1e-5)


@pytest.mark.parametrize("weighted", [True, False])
def test_neighbours_vote_as_scikit_learns_do(weighted: bool):
    train, test = labelled(300, 4, 2.0), labelled(120, 5, 2.0)
    config = ProbeConfig(neighbours=7, weighted=weighted)
    votes = torch.cat([one for _, one in neighbour_votes(train, test.values, CLASSES, config)])
    theirs = KNeighborsClassifier(
        7,
        metric="cosine",
        algorithm="brute",
        weights=(lambda distance: np.exp((1 - distance) / 0.07)) if weighted else "uniform",
    )
    theirs.fit(train.values.double().numpy(), train.labels.numpy())
    expected = theirs.predict(test.values.double().numpy())
    assert (votes.argmax(dim=1).numpy() == expected).mean() >= 0.99  # a tie may go either way


def test_l2_is_chosen_where_it_generalises_and_refused_where_nothing_can_be_held_out():
    assert 1e-7 < choose_strength(labelled(500, 6, 3.0), CLASSES) <= 1e-1
    with pytest.raises(InputError, match="l2"):
        choose_strength(labelled(10, 6), CLASSES)


def test_a_mean_over_seeds_has_the_wider_interval_of_both_sources():
    train, test = labelled(100, 7, 3.0), labelled(60, 8, 3.0)
    config = ProbeConfig(shots=(1,), seeds=4)
    answers = answer_probes(train, test, CLASSES, ("few_shot_1",), config)
    evalset = class_set(test.labels.tolist(), [f"c{n}" for n in range(CLASSES)])
    evalset = replace(evalset, probes=("few_shot_1",))
    made = Scored(evalset, classes=answered(evalset, [0] * 60), probes=answers)
    figures = compute_figures(made)
    by_seed = figures["probes"]["few_shot_1"]["by_seed"]
    assert figures["few_shot_1"] == pytest.approx(np.mean(by_seed))
    low, high = figures["intervals"]["few_shot_1"]
    assert high - low > 2 * 1.96 * np.std(by_seed, ddof=1) / 2 - 0.02
    assert low < figures["few_shot_1"] < high
    assert "linear_probe" not in figures


def test_an_evaluation_gives_the_figures_of_probes_where_a_set_has_a_train_part(
    tmp_path: Path, classification: Path, retrieval: Path, saved_model: Callable[[int], Path]
):
    shutil.copytree(classification / "test", classification / "train")
    sets = {"colours": classification, "discs": retrieval}
    values = {
        "sets": [
            {"name": "colours", "kind": "classification", "folder": "x"},
            {"name": "discs", "kind": "retrieval", "folder": "y"},
        ]
    }
    asked = {"probes": ["linear", "knn", "few_shot"]}
    asked["probe"] = {"l2": 1e-5, "shots": [1, 2], "seeds": 2, "neighbours": 1}
    config = EvaluateConfig.from_mapping(values | asked, "here")
    models = {"one": saved_model(1), "two": saved_model(2)}
    evaluate_models(config, models, sets, (), tmp_path / "out", report_nothing)
    found = json.loads((tmp_path / "out" / "results.json").read_text())["results"]["colours"]["one"]
    assert found["knn"] == 1.0  # the nearest training image is the image itself
    assert found["probes"]["linear_probe"]["gradient"] <= 1e-7
    assert "1-shot" in (tmp_path / "out" / "report.md").read_text()
    plain = EvaluateConfig.from_mapping(values, "here")
    assert plain.compute_identity().keys().isdisjoint(asked)


def test_a_train_part_is_joined_to_the_set_by_names(tmp_path: Path, classification: Path):
    shutil.copytree(classification, tmp_path / "whole")
    shutil.move(tmp_path / "whole", classification / "train")
    names = ["Green-Disc", "red disc", "yellow disc", "blue disc"]
    (classification / "train" / "classnames.txt").write_text("\n".join(names) + "\n")
    evalset = open_set("colours", classification, "classification")
    part = open_train_part(evalset, classification)
    assert part is not None
    assert [one.label for one in part.samples[:4]] == [1, 0, 3, 2]
    (classification / "train" / "classnames.txt").write_text("a\nb\nc\nd\n")
    with pytest.raises(InputError, match="'a', which is not a class"):
        open_train_part(evalset, classification)


def test_a_train_part_stays_when_its_set_is_made_again_and_is_no_link(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / name / "1.png")
    convert = (tmp_path / "pictures", tmp_path / "set", Words(templates="none"))
    convert_imagefolder(convert[0], tmp_path / "set" / "train", convert[2])
    assert not convert_imagefolder(*convert).again
    Image.new("RGB", (9, 9)).save(tmp_path / "pictures" / "b" / "2.png")
    assert convert_imagefolder(*convert).again
    evalset = open_set("mine", tmp_path / "set", "classification", ("{c}",))
    part = open_train_part(evalset, tmp_path / "set")
    assert part is not None and (len(evalset), len(part)) == (3, 2)
    (tmp_path / "set" / "train").rename(tmp_path / "elsewhere")
    (tmp_path / "set" / "train").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is a link"):
        open_train_part(evalset, tmp_path / "set")


def test_probes_without_any_train_part_are_refused(
    tmp_path: Path, classification: Path, saved_model: Callable[[int], Path]
):
    values = {"sets": [{"name": "colours", "kind": "classification", "folder": "x"}]}
    config = EvaluateConfig.from_mapping({**values, "probes": ["knn"]}, "here")
    with pytest.raises(InputError, match="no set has a train part"):
        evaluate_models(
            config,
            {"one": saved_model(1)},
            {"colours": classification},
            (),
            tmp_path / "out",
            report_nothing,
        )
