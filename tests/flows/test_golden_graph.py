"""Digests of artifacts and plans of the shipped recipes, as they were before the graph was declared
once (a plan names the published accuracy since then).

A digest that moves makes every finished artifact and every checkpoint of a recipe worthless: a
change that means to do so says in CHANGELOG.md what becomes invalid, and renews these files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.__main__ import main
from flows.config.recipe import Recipe, load_recipe
from flows.config.recipe_loader import recipe_names
from flows.graph.graph import CHAMPION, Beside, Graph, data_steps, draw_graph
from flows.graph.incremental import News, draw_retraining, new_merge_step
from flows.graph.step import Step
from tasks.artifacts.artifact import Artifact, Role
from tasks.register.promotion import Standing

GOLDEN = Path(__file__).parents[1] / "golden"
DIGESTS: dict[str, dict[str, str]] = json.loads((GOLDEN / "graph_digests.json").read_text())
RETRAINING: dict[str, Any] = json.loads((GOLDEN / "graph_digests_retraining.json").read_text())


def drawn(name: str) -> tuple[Recipe, Graph]:
    recipe = load_recipe(name)
    return recipe, draw_graph(recipe, Path("/nowhere"), "sqlite:///golden.db")


def made(kind: str, digit: str, **counts: int) -> Artifact:
    empty: dict[str, Any] = {"parents": {}, "config": {}, "files": {}, "created": "2026"}
    folder = Path("/nowhere")
    return Artifact(kind=kind, digest=16 * digit, folder=folder, counts=counts, **empty)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipes_digests_are_what_they_were(name: str) -> None:
    _, graph = drawn(name)
    assert [(step.title, step.digest) for step in graph.steps] == list(DIGESTS[name].items())


@pytest.mark.parametrize("name", [name for name in recipe_names() if name != "finetune"])
def test_every_recipes_retraining_has_the_digests_that_it_had(name: str, tmp_path: Path) -> None:
    recipe, graph = drawn(name)
    files = {}
    for source in recipe.merge.sources:
        (tmp_path / f"{source.name}.parquet").write_text(source.name)
        files[source.name] = [tmp_path / f"{source.name}.parquet"]
    standing = Standing(1, 16 * "t", 64 * "w", "promote", "")
    known = (made("merge", "m", selected=1000),)
    news = News(standing, made("train", "t"), None, (), (), known, (), files, {})
    merge = new_merge_step(recipe, graph, news)
    assert merge is not None
    verify = data_steps(graph.site, recipe, made("merge", "m", selected=1))
    download = verify.inputs[Role.DOWNLOAD]
    assert isinstance(download, Step)

    def told(news: News, parts: str, champion: Beside | None) -> dict[str, str | None]:
        verified: Sequence[Artifact] = [made("verify", digit) for digit in parts]
        again = draw_retraining(recipe, graph, news, verified, champion)
        data = again.dataset.inputs[Role.DATA]
        steps = (again.dataset, *again.train, again.evaluate, again.register)
        join = data.digest if isinstance(data, Step) else None
        return {"join": join, **{step.title: step.digest for step in steps}}

    champion = Beside(CHAMPION, Role.CHAMPION, 16 * "w", Path("/nowhere"))
    assert RETRAINING[name] == {
        "merge": merge.digest,
        "download": download.digest,
        "verify": verify.digest,
        "from the champion": told(news, "ab", champion),
        "without a champion": told(replace(news, champion=None, start=None), "a", None),
    }


@pytest.mark.parametrize("name", ["demo", "eva02-clip-b-16", "eva02-clip-l-14"])
def test_a_plan_says_what_it_said(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EVACLIP_ROOT", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    assert main(["plan", name]) == 0
    said, _, end = capsys.readouterr().out.partition("artifacts in ")
    said = re.sub(r"\A(.*) \([0-9a-f]{16}\)\n", r"\1 (RECIPE)\n", said)
    if name == "demo":
        assert "disk: needs 189 MB" in end
        said = re.sub(r"(?m)^(register .*) [0-9a-f]{16}$", r"\1 REGISTRY", said)
    assert said == (GOLDEN / f"plan_{name}.txt").read_text()
