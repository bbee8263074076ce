"""What a retraining plans: settings of the warm start, the merge of what is new, its addresses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evaclip_model.errors import InputError
from flows.config.recipe import Recipe, load_recipe
from flows.graph.graph import Chart, draw_chart
from flows.graph.incremental import News, draw_retraining, increment, part_of, rows_of
from tasks.artifacts.artifact import Artifact
from tasks.register.promotion import Standing


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("demo")


@pytest.fixture
def chart(recipe: Recipe, tmp_path: Path) -> Chart:
    return draw_chart(recipe, tmp_path, f"sqlite:///{tmp_path}/mlflow.db")


def artifact(kind: str, digest: str, **counts: int) -> Artifact:
    empty: dict[str, Any] = {"parents": {}, "config": {}, "files": {}, "created": "2026"}
    return Artifact(kind=kind, digest=digest, folder=Path("/nowhere"), counts=counts, **empty)


def merged(digest: str, laion2b: int, coyo700m: int) -> Artifact:
    counts = {"selected": laion2b + coyo700m}
    named = {"laion2b.selected": laion2b, "coyo700m.selected": coyo700m}
    return artifact("merge", digest, **counts, **named)


@pytest.fixture
def news(tmp_path: Path) -> News:
    """A champion trained on one merge, and a new file of each source."""
    files = {}
    for source in ("laion2b", "coyo700m"):
        path = tmp_path / f"{source}.parquet"
        path.write_text(source)
        files[source] = [path]
    champion = Standing(1, "t" * 16, "w" * 64, None, "promote", "")
    known = (merged("m" * 16, 900, 100),)
    return News(champion, artifact("train", "t" * 16), None, (), (), known, (), files)


def test_the_warm_start_runs_the_chosen_stages_with_smaller_steps() -> None:
    changes = ["retrain.stages=['stage2']", "retrain.lr_scale=0.5", "retrain.samples_seen=1280"]
    recipe = load_recipe("demo", [*changes, "retrain.warmup_steps=3"])
    (stage,) = recipe.retraining()
    (original,) = [one for one in recipe.train if one.name == "stage2"]
    assert stage.lr_vision == original.lr_vision / 2
    assert stage.lr_other == original.lr_other / 2
    assert (stage.samples_seen, stage.warmup_steps) == (1280, 3)
    assert stage.patch_dropout == original.patch_dropout
    assert load_recipe("demo").retraining() == load_recipe("demo").train


def test_a_stage_or_a_metric_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"retrain\.stages names 'stage3'.*stage1, stage2"):
        load_recipe("demo", ["retrain.stages=['stage3']"])
    with pytest.raises(InputError, match=r"register\.gate\.metrics names 'imagenet\.top1'"):
        load_recipe("demo", ["register.gate.metrics=['imagenet.top1']"])
    metrics = load_recipe("demo", ["register.gate.metrics=['emoji-twemoji.top1']"])
    assert metrics.registry.gate.metrics == ("emoji-twemoji.top1",)


def test_the_merge_of_what_is_new_fills_every_source_up_to_its_target(
    recipe: Recipe, chart: Chart, news: News
) -> None:
    planned = increment(recipe, chart, news)
    assert planned is not None
    address, config = planned
    assert {s.name: s.wanted_rows for s in config.sources} == {"laion2b": 1100, "coyo700m": 1900}
    assert {"laion2b", "coyo700m", "given"} == set(address.parents)
    assert config.filters == recipe.merge.filters


def test_a_source_that_is_full_or_has_nothing_new_is_not_merged(
    recipe: Recipe, chart: Chart, news: News
) -> None:
    full = replace(news, known=(merged("m" * 16, 2000, 100),))
    planned = increment(recipe, chart, full)
    assert planned is not None
    assert [source.name for source in planned[1].sources] == ["coyo700m"]
    assert increment(recipe, chart, replace(full, files={"laion2b": news.files["laion2b"]})) is None


def test_the_address_changes_with_the_files_content_and_with_what_was_given(
    recipe: Recipe, chart: Chart, news: News, tmp_path: Path
) -> None:
    def digest(one: News) -> str:
        planned = increment(recipe, chart, one)
        assert planned is not None
        return planned[0].digest

    before = digest(news)
    assert digest(news) == before
    assert digest(replace(news, known=(*news.known, merged("n" * 16, 0, 0)))) != before
    (tmp_path / "laion2b.parquet").write_text("more")
    assert digest(news) != before


def test_everything_behind_the_data_has_its_address_before_it_is_made(
    recipe: Recipe, chart: Chart, news: News
) -> None:
    drawn, join = draw_retraining(recipe, chart, news, ["a" * 16, "b" * 16])
    assert join is not None and list(join.parents.values()) == ["a" * 16, "b" * 16]
    assert drawn.dataset.parents["verify"] == join.digest
    assert drawn.train[0].parents == {"start_from": "t" * 16, "dataset": drawn.dataset.digest}
    assert drawn.evaluate.parents["champion"] == "w" * 16
    assert "initialise" not in drawn.evaluate.parents
    assert drawn.register.parents["evaluate"] == drawn.evaluate.digest
    alone, none = draw_retraining(recipe, chart, news, ["a" * 16])
    assert none is None
    assert alone.dataset.parents["verify"] == "a" * 16


def test_without_a_champion_training_begins_where_the_recipe_does(
    recipe: Recipe, chart: Chart, news: News
) -> None:
    first = replace(news, champion=None, start=None)
    drawn, _ = draw_retraining(recipe, chart, first, ["a" * 16])
    assert drawn.train[0].parents["start_from"] == chart.initialise.digest
    assert drawn.evaluate.parents["initialise"] == chart.initialise.digest


def test_nothing_is_new_without_files_and_without_rows_that_wait(news: News) -> None:
    last = object()
    assert replace(news, last=None).is_first
    seen = replace(news, last=last, files={})  # type: ignore[arg-type]
    assert seen.is_nothing
    assert not replace(seen, waiting=(merged("x" * 16, 1, 0),)).is_nothing
    assert replace(seen, waiting=(merged("x" * 16, 0, 0),)).is_nothing
    assert not replace(seen, files=news.files).is_nothing
    assert rows_of([merged("x" * 16, 3, 4), merged("y" * 16, 1, 0)]) == 8


def test_a_merges_download_and_verification_have_one_place(recipe: Recipe, tmp_path: Path) -> None:
    download, verify = part_of(recipe, merged("m" * 16, 1, 1), tmp_path)
    assert download.parents == {"merge": "m" * 16}
    assert verify.parents == {"download": download.digest}
