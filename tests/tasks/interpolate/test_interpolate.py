"""The model between two: its weights, which one is taken, and what a recipe's graph makes of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from evaclip_model import InputError, create_model, interpolate_weights, open_model, save_model
from evaclip_model.cli import main
from flows.config.recipe import load_recipe
from flows.graph.graph import draw_graph
from flows.graph.step import digest_of
from tasks.interpolate.config import InterpolateConfig
from tasks.interpolate.interpolate import choose_weight, find_losses, interpolate_models
from tasks.progress import report_nothing

DEMO = "EVA02-CLIP-demo"
TABLE = 'interpolate={choose_on=["emoji-twemoji"], keep_on=["emoji-twemoji-retrieval"]}'


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a start and of an end at a larger image."""
    folder = tmp_path_factory.mktemp("pair")
    start = create_model(DEMO, seed=0)
    save_model(start, folder / "start")
    save_model(create_model(start.config.at_image_px(48), seed=1), folder / "end")
    return folder / "start", folder / "end"


def test_every_weight_lies_between_and_the_ends_are_exact(pair: tuple[Path, Path]) -> None:
    ends = [interpolate_weights(*pair, weight).state_dict() for weight in (0, 1)]
    begun, ended = (open_model(folder).state_dict() for folder in pair)
    assert all(torch.equal(value, ended[name]) for name, value in ends[1].items())
    shared = [name for name in begun if name != "visual.pos_embed"]
    assert all(torch.equal(ends[0][name], begun[name]) for name in shared)
    quarter = interpolate_weights(*pair, 0.25).state_dict()
    for name, value in quarter.items():
        torch.testing.assert_close(value, 0.75 * ends[0][name] + 0.25 * ends[1][name])


def test_the_command_writes_a_model(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, end = map(str, pair)
    out = str(tmp_path / "between")
    assert main(["interpolate", start, end, "--weight", "0.5", "-o", out]) == 0
    made, expected = open_model(out).state_dict(), interpolate_weights(*pair, 0.5).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in made.items())
    assert main(["interpolate", start, end, "--weight", "1.5", "-o", out]) == 2
    assert main(["interpolate", str(tmp_path), end, "--weight", "0.5", "-o", out]) == 2
    assert "holds no weights" in capsys.readouterr().err


def results_of(new: Mapping[str, float], lost: Mapping[str, float]) -> dict[str, Any]:
    """Figures of a set `new`, and of a set `old` on which the start has 0.9."""
    figures = {name: {"top1": value, "top5": 1.0, "n": 9} for name, value in new.items()}
    olds = {name: {"top1": 0.9 - loss, "top5": 0.0} for name, loss in lost.items()}
    return {"results": {"new": figures, "old": {"0": {"top1": 0.9, "top5": 1.0}, **olds}}}


def test_the_best_that_loses_nothing_is_written_with_the_figures_of_all(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    new = {"0": 0.2, "0.5": 0.6, "0.75": 0.6, "1": 0.8}
    seen: list[list[str]] = []

    def evaluate(models: Mapping[str, Path], folder: Path) -> dict[str, Any]:
        assert all((place / "model.safetensors").is_file() for place in models.values())
        seen.append(list(models))
        return results_of(new, {"0.5": 0.005, "0.75": -0.2, "1": 0.02})

    config = InterpolateConfig(weights=(1, 0.75, 0.5), choose_on=("new",), keep_on=("old",))
    made = interpolate_models(config, *pair, evaluate, ("top1",), tmp_path, report_nothing)
    assert seen == [list(new)]
    assert made.counts == {"weight": 0.5, **{f"weight.{name}.mean": new[name] for name in new}}
    between = interpolate_weights(*pair, 0.5).state_dict()
    written = open_model(tmp_path / "model").state_dict()
    assert all(torch.equal(value, between[name]) for name, value in written.items())
    choice = json.loads((tmp_path / "choice.json").read_text())
    assert choice["weights"]["1"]["lost"] == ["old.top1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["choice.json", "model"]


def test_where_every_weight_loses_too_much_a_sentence_says_so() -> None:
    results = results_of({}, {"0.5": 0.019, "1": 0.021})
    config = InterpolateConfig(
        weights=(1,), choose_on=("new",), keep_on=("old",), max_loss_points=2
    )
    lost = {name: find_losses(results, name, config, ["top1"]) for name in ("0", "0.5", "1")}
    assert lost == {"0": [], "0.5": [], "1": ["old.top1"]}
    with pytest.raises(InputError, match=r"max_loss_points on old\.top1: add lower ones"):
        choose_weight(config, {"1": 0.8}, lost)


def test_a_recipe_evaluates_and_registers_what_lies_between(tmp_path: Path) -> None:
    plain = draw_graph(load_recipe("demo"), tmp_path, "sqlite:///x")
    graph = draw_graph(load_recipe("demo", [TABLE]), tmp_path, "sqlite:///x")
    kinds = [step.stage.name for step in graph.steps]
    assert kinds[-4:] == ["train", "interpolate", "evaluate", "register"]
    assert graph.train[-1].digest == plain.train[-1].digest
    assert digest_of(graph.evaluate.inputs["train"]) == graph.final.digest
    again = draw_graph(load_recipe("demo", [TABLE, "evaluate.title=x"]), tmp_path, "sqlite:///x")
    assert again.final.digest == graph.final.digest


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('interpolate={choose_on=["nowhere"]}', r"names 'nowhere', which is none of evaluate.sets"),
        ('interpolate={choose_on=["emoji-twemoji"], weights=[2]}', "less than or equal to 1"),
        ("interpolate={weights=[0.5]}", "'interpolate.choose_on' is missing"),
    ],
)
def test_a_wrong_table_is_one_sentence(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe("demo", [override])
