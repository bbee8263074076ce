"""The graph of a recipe: addresses, what moves them, what is not here, and its plan."""

from pathlib import Path

import pytest

from evaclip_model.errors import InputError
from flows.config.recipe import load_recipe
from flows.graph.graph import draw_graph
from flows.graph.outside_data import find_files
from flows.planning.run_plan import check_disk, make_plan, plan_markdown
from tasks.artifacts.artifact import Made, produce_artifact
from tasks.demo.config import STAGE as DEMO
from tasks.merge.config import STAGE as MERGE

ORDER = [
    *("demo", "merge", "download", "verify", "dataset"),
    *("initialise", "train", "train", "evaluate"),
]


def graph_of(root: Path, *overrides: str):
    return draw_graph(load_recipe("demo", overrides), root, "sqlite:///there.db")


def test_more_lanes_than_a_source_may_give_are_refused_before_it_is_downloaded(
    tmp_path: Path,
) -> None:
    few = ("merge.sources.coyo700m.target_count=7", "train.stage1.global_batch=16")
    with pytest.raises(InputError, match=r"'stage1' reads 16 lanes, but source 'coyo700m' has"):
        graph_of(tmp_path, *few)


def test_every_stage_is_addressed_in_the_order_of_work(tmp_path: Path) -> None:
    kinds = [step.stage.name for step in graph_of(tmp_path).steps]
    assert kinds == [*ORDER, "register"]


def test_a_changed_setting_moves_its_stage_and_all_that_follow_and_nothing_before(
    tmp_path: Path,
) -> None:
    before, after = graph_of(tmp_path), graph_of(tmp_path, "train.stage2.lr_vision=1e-5")
    moved = [b.digest != a.digest for b, a in zip(before.steps, after.steps, strict=True)]
    assert moved == [False] * 7 + [True] * 3


def test_how_the_merge_works_does_not_move_its_address(tmp_path: Path) -> None:
    changed = graph_of(tmp_path, "merge.partitions=9", "merge.memory_limit=2GB")
    assert changed.find_step(MERGE).digest == graph_of(tmp_path).find_step(MERGE).digest


def test_another_tracking_server_asks_for_another_registration(tmp_path: Path) -> None:
    recipe = load_recipe("demo")
    here, there = (draw_graph(recipe, tmp_path, uri) for uri in ("sqlite:///a", "sqlite:///b"))
    assert here.register.digest != there.register.digest
    assert here.evaluate.digest == there.evaluate.digest


def test_outside_metadata_is_known_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "own.parquet"
    file.write_bytes(b"one")
    override = f"merge.sources.laion2b.files={tmp_path}/*.parquet"
    first = graph_of(tmp_path, override).find_step(MERGE).digest
    file.write_bytes(b"two")
    assert graph_of(tmp_path, override).find_step(MERGE).digest != first


def test_what_is_not_here_stops_the_flows_that_read_it_and_no_plan(tmp_path: Path) -> None:
    graph = graph_of(
        tmp_path,
        f"merge.sources.laion2b.files={tmp_path}/none*.parquet",
        "merge.sources.laion2b.revision=edition 7",
    )
    sentence = f"merge.sources 'laion2b': no file matches '{tmp_path}/none*.parquet'"
    assert [one for step in graph.steps for one in step.absent] == [f"{sentence}; it is edition 7"]
    for flow in ("prepare", "train", "pipeline"):
        with pytest.raises(InputError, match="no file matches"):
            graph.require_runnable(flow)
    settled = {step.stage.name for step in graph.steps if step.is_settled}
    assert settled == {"demo", "initialise"}


def test_weights_that_are_not_here_stop_training_and_not_the_data(tmp_path: Path) -> None:
    origins = {"there.pt": "the shop"}
    graph = graph_of(
        tmp_path,
        "initialise.vision=there.pt",
        "initialise.text=nowhere.pt",
        f"initialise.origins={origins}".replace("': '", "' = '"),
    )
    graph.require_runnable("prepare")
    with pytest.raises(
        InputError, match=r"initialise.vision: there.pt does not exist; the shop \(1 more"
    ):
        graph.require_runnable("train")
    unsettled = {step.stage.name for step in graph.steps if not step.is_settled}
    assert unsettled == {"initialise", "train", "evaluate", "register"}


def test_demo_files_need_a_demo(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"needs a \[demo\] table"):
        find_files("demo:x/*.parquet", None, "merge.sources 'x'")


def test_a_plan_tells_what_is_there_what_is_unfinished_and_what_is_to_make(tmp_path: Path) -> None:
    recipe, graph = load_recipe("demo"), graph_of(tmp_path)
    produce_artifact(graph.find_step(DEMO).address, lambda out: Made({"concepts": 7}, ()))
    half_made = graph.find_step(MERGE).folder
    half_made.mkdir(parents=True)
    (half_made / "half").touch()
    rows = make_plan(graph)
    assert [row.state for row in rows[:3]] == ["there", "unfinished", "to make"]
    assert rows[0].size == "concepts 7"
    assert [row.title for row in rows[6:8]] == ["train stage1", "train stage2"]
    assert f"steps of {recipe.train[0].global_batch}" in rows[6].size
    assert plan_markdown(recipe, graph).count("\n") == len(rows) + 3


def test_a_disk_that_is_too_small_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    recipe = load_recipe("demo", ["merge.sources.laion2b.target_count=4000000000000"])
    with pytest.raises(InputError, match="GB free and this run needs about"):
        check_disk(draw_graph(recipe, tmp_path, ""))
