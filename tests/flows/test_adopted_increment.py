"""Retraining of a recipe that adopts: new files are found, the old ones are not taken again."""

from __future__ import annotations

from pathlib import Path

from flows.config.profile import Profile
from flows.config.recipe import Recipe
from flows.graph.graph import adopt_step, draw_graph
from flows.graph.incremental import News, describe_new_data, find_new_data, new_adopt_step
from tasks.adopt.config import AdoptConfig
from tasks.artifacts.artifact import Role
from tasks.index.adopted_shards import read_adopted
from tasks.progress import report_nothing
from tasks.tracking import TrackingStore
from tests.flows.test_attempts import RECIPE, make_artifact, make_champion
from tests.tasks.adopt.test_adopt import pack, stranger, write_pictures


def write_photos(folder: Path, numbers: range) -> None:
    write_pictures(folder, numbers)
    for number in numbers:
        (folder / f"{number}.txt").write_text("a photo")


def look_for_news(recipe: Recipe, root: Path) -> News:
    store = TrackingStore.at(f"sqlite:///{root}/mlflow.db", "e")
    return find_new_data(recipe, draw_graph(recipe, root, store.uri), store, keep_rejected=False)


def test_new_shards_and_pictures_are_adopted_and_the_old_ones_are_not(tmp_path: Path) -> None:
    pack(tmp_path / "shards/0.tar", [stranger(number) for number in range(8)])
    write_photos(tmp_path / "photos", range(100, 106))
    sources = [
        {"name": "shards", "files": f"{tmp_path}/shards/*.tar"},
        {"name": "photos", "files": f"{tmp_path}/photos", "form": "folder"},
    ]
    adopt = AdoptConfig.from_mapping({"sources": sources}, where="test")
    without = {"merge_table": None, "download_table": None, "demo": None}
    evaluate = RECIPE.evaluate.model_copy(update={"sets": ()})
    recipe = RECIPE.model_copy(update={**without, "adopt": adopt, "evaluate_table": evaluate})
    root = tmp_path / "runs"
    root.mkdir()
    store = TrackingStore.at(f"sqlite:///{root}/mlflow.db", "e")
    site = draw_graph(recipe, root, store.uri).site
    profile = Profile(_env_file=None, root=root)
    adopted = adopt_step(site, adopt).make_artifact(profile, report_nothing)
    verify = make_artifact(root, "verify", {Role.ADOPT: adopted.digest})
    make_champion(recipe, root, store, verify)
    assert look_for_news(recipe, root).is_nothing

    pack(tmp_path / "shards/1.tar", [stranger(number) for number in range(20, 28)])
    write_photos(tmp_path / "photos", range(200, 203))
    news = look_for_news(recipe, root)
    assert {name: len(files) for name, files in news.files.items()} == {"shards": 1, "photos": 6}
    graph = draw_graph(recipe, root, store.uri)
    step = new_adopt_step(recipe, graph, news)
    assert step is not None and Role.GIVEN in step.inputs
    second = step.make_artifact(profile, report_nothing)
    assert [(one.source, one.name) for one in read_adopted(second.folder)] == [
        ("shards", "1.tar"),
        ("photos", "000000.tar"),
    ]
    waiting = look_for_news(recipe, root)
    assert waiting.files == {} and [one.digest for one in waiting.waiting] == [second.digest]
    assert any("2 shards that were adopted" in line for line in describe_new_data(waiting, recipe))
