"""What a retraining plans: settings of the warm start, the merge of what is new, its addresses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evaclip_model.errors import InputError
from flows.config.recipe import Recipe, load_recipe
from flows.graph.graph import CHAMPION, Beside, Graph, data_steps, draw_graph
from flows.graph.incremental import News, draw_retraining, new_merge_step, rows_of
from flows.graph.step import Step
from tasks.artifacts.artifact import Artifact, Role
from tasks.merge.config import MergeConfig
from tasks.register.promotion import Standing


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("demo")


@pytest.fixture
def graph(recipe: Recipe, tmp_path: Path) -> Graph:
    return draw_graph(recipe, tmp_path, f"sqlite:///{tmp_path}/mlflow.db")


def artifact(kind: str, digest: str, **counts: int) -> Artifact:
    empty: dict[str, Any] = {"parents": {}, "config": {}, "files": {}, "created": "2026"}
    return Artifact(kind=kind, digest=digest, folder=Path("/nowhere"), counts=counts, **empty)


def merged(digest: str, laion2b: int, coyo700m: int) -> Artifact:
    counts = {"selected": laion2b + coyo700m}
    named = {"laion2b.selected": laion2b, "coyo700m.selected": coyo700m}
    return artifact("merge", digest, **counts, **named)


def merge_config(step: Step) -> MergeConfig:
    assert isinstance(step.config, MergeConfig)
    return step.config


@pytest.fixture
def news(tmp_path: Path) -> News:
    """A champion trained on one merge, and a new file of each source."""
    files = {}
    for source in ("laion2b", "coyo700m"):
        path = tmp_path / f"{source}.parquet"
        path.write_text(source)
        files[source] = [path]
    champion = Standing(1, "t" * 16, "w" * 64, "promote", "")
    known = (merged("m" * 16, 900, 100),)
    return News(champion, artifact("train", "t" * 16), None, (), (), known, (), files, {})


def test_the_warm_start_runs_the_chosen_stages_with_smaller_steps() -> None:
    changes = ["retrain.stages=['stage2']", "retrain.lr_scale=0.5", "retrain.samples_seen=1280"]
    recipe = load_recipe("demo", [*changes, "retrain.warmup_steps=3"])
    (stage,) = recipe.retraining_stages()
    (original,) = [one for one in recipe.train if one.name == "stage2"]
    assert stage.lr_vision == original.lr_vision / 2
    assert stage.lr_other == original.lr_other / 2
    assert (stage.samples_seen, stage.warmup_steps) == (1280, 3)
    assert stage.patch_dropout == original.patch_dropout
    assert load_recipe("demo").retraining_stages() == load_recipe("demo").train


def test_a_stage_or_a_metric_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"retrain\.stages names 'stage3'.*stage1, stage2"):
        load_recipe("demo", ["retrain.stages=['stage3']"])
    with pytest.raises(InputError, match=r"register\.gate\.metrics names 'imagenet\.top1'"):
        load_recipe("demo", ["register.gate.metrics=['imagenet.top1']"])
    metrics = load_recipe("demo", ["register.gate.metrics=['emoji-twemoji.top1']"])
    assert metrics.registry.gate.metrics == ("emoji-twemoji.top1",)


def test_the_merge_of_what_is_new_fills_every_source_up_to_its_target(
    recipe: Recipe, graph: Graph, news: News
) -> None:
    planned = new_merge_step(recipe, graph, news)
    assert planned is not None
    config = merge_config(planned)
    assert {s.name: s.wanted_rows for s in config.sources} == {"laion2b": 1100, "coyo700m": 1900}
    assert {"laion2b", "coyo700m", "given"} == set(planned.inputs)
    assert config.filters == recipe.merge.filters


def test_a_source_that_is_full_or_has_nothing_new_is_not_merged(
    recipe: Recipe, graph: Graph, news: News
) -> None:
    full = replace(news, known=(merged("m" * 16, 2000, 100),))
    planned = new_merge_step(recipe, graph, full)
    assert planned is not None
    assert [source.name for source in merge_config(planned).sources] == ["coyo700m"]
    nothing = replace(full, files={"laion2b": news.files["laion2b"]})
    assert new_merge_step(recipe, graph, nothing) is None


def test_the_address_changes_with_the_files_content_and_with_what_was_given(
    recipe: Recipe, graph: Graph, news: News, tmp_path: Path
) -> None:
    def digest(one: News) -> str:
        planned = new_merge_step(recipe, graph, one)
        assert planned is not None
        return planned.digest

    before = digest(news)
    assert digest(news) == before
    assert digest(replace(news, known=(*news.known, merged("n" * 16, 0, 0)))) != before
    (tmp_path / "laion2b.parquet").write_text("more")
    assert digest(news) != before


def test_a_list_of_entries_to_balance_by_is_part_of_the_address(
    recipe: Recipe, news: News, tmp_path: Path
) -> None:
    def digest(entries: str) -> str:
        listed = tmp_path / "entries.txt"
        listed.write_text(entries)
        merge = recipe.merge.model_dump() | {"balance": {"t": 9, "entries": str(listed)}}
        config = MergeConfig.from_mapping(merge, where="test")
        balanced = recipe.model_copy(update={"merge_table": config})
        graph = draw_graph(balanced, tmp_path, f"sqlite:///{tmp_path}/mlflow.db")
        planned = new_merge_step(balanced, graph, news)
        assert planned is not None and merge_config(planned).balance == config.balance
        return planned.digest

    assert digest("cat") == digest("cat") != digest("dog")


def test_everything_behind_the_data_has_its_address_before_it_is_made(
    recipe: Recipe, graph: Graph, news: News
) -> None:
    parts = [artifact("verify", "a" * 16), artifact("verify", "b" * 16)]
    champion = Beside(CHAMPION, Role.CHAMPION, "w" * 16, Path("/champion"))
    drawn = draw_retraining(recipe, graph, news, parts, champion)
    join = drawn.dataset.inputs[Role.DATA]
    assert isinstance(join, Step) and list(join.inputs.values()) == parts
    assert drawn.train[0].address.parents == {
        "start_from": "t" * 16,
        "dataset": drawn.dataset.digest,
    }
    assert drawn.evaluate.inputs["champion"] == "w" * 16
    assert "initialise" not in drawn.evaluate.inputs
    assert drawn.register.inputs["evaluate"] is drawn.evaluate
    assert [step.title for step in drawn.steps] == [
        *("demo", "join", "dataset", "train stage1", "train stage2", "evaluate", "register")
    ]
    alone = draw_retraining(recipe, graph, news, parts[:1], champion)
    assert alone.dataset.inputs[Role.DATA] == parts[0]


def test_the_champion_judges_what_is_new_and_what_was_judged_before_stays_so(
    recipe: Recipe, graph: Graph, news: News
) -> None:
    rule = load_recipe("demo", ["retrain.keep_share=0.7"])
    first, second, new = (artifact("verify", letter * 16) for letter in "abc")
    judged = artifact("embed", "e" * 16)
    before = replace(news, used=(first, second), judged={second.digest: judged})
    champion = Beside(CHAMPION, Role.CHAMPION, "w" * 16, Path("/champion"))
    drawn = draw_retraining(rule, graph, before, [first, second, new], champion)
    inputs = drawn.dataset.inputs
    assert [role for role in inputs if role.startswith("judged")] == ["judged0001", "judged0002"]
    assert inputs["judged0001"] is judged
    judge = inputs["judged0002"]
    assert isinstance(judge, Step) and judge.inputs[Role.DATA] is new
    assert judge.title == "embed models:/evaclip-demo/1"
    assert judge in drawn.data_steps
    assert drawn.dataset.config.model_dump()["keep_share"] == 0.7
    assert rule.dataset.keep_share is None, "the first data is taken as it is"
    plain = draw_retraining(recipe, graph, before, [first, second, new], champion)
    assert not [role for role in plain.dataset.inputs if role.startswith("judged")]


def test_without_a_champion_training_begins_where_the_recipe_does(
    recipe: Recipe, graph: Graph, news: News
) -> None:
    first = replace(news, champion=None, start=None)
    drawn = draw_retraining(recipe, graph, first, [artifact("verify", "a" * 16)], None)
    start = graph.train[0].address.parents["start_from"]
    assert drawn.train[0].address.parents["start_from"] == start
    assert drawn.evaluate.address.parents["initialise"] == start


def test_nothing_is_new_without_files_and_without_rows_that_wait(news: News) -> None:
    last = object()
    assert not replace(news, last=None, files={}).is_nothing
    seen = replace(news, last=last, files={})  # type: ignore[arg-type]
    assert seen.is_nothing
    assert not replace(seen, waiting=(merged("x" * 16, 1, 0),)).is_nothing
    assert replace(seen, waiting=(merged("x" * 16, 0, 0),)).is_nothing
    assert not replace(seen, files=news.files).is_nothing
    assert rows_of([merged("x" * 16, 3, 4), merged("y" * 16, 1, 0)]) == 8


def test_a_merges_download_and_verification_have_one_place(recipe: Recipe, graph: Graph) -> None:
    verify = data_steps(graph.site, recipe, merged("m" * 16, 1, 1))
    download = verify.inputs["download"]
    assert isinstance(download, Step)
    assert download.address.parents == {"merge": "m" * 16}
    assert verify.address.parents == {"download": download.digest}
