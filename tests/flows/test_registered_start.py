"""A registered model as the beginning of a recipe: by its version's weights, not by its name."""

from pathlib import Path

import pytest

from evaclip_model.errors import InputError
from flows.config.profile import load_profile
from flows.config.recipe import load_recipe
from flows.graph.graph import Graph, draw_graph
from tasks.artifacts.artifact import sha256_of
from tasks.initialise.config import STAGE
from tasks.progress import report_nothing
from tasks.register.promotion import promote_version
from tasks.tracking import TrackingStore
from tests.tasks.register.registrations import register_random_model, trained_and_evaluated

WEIGHTS = Path("model") / "model.safetensors"


def graph_of(root: Path, uri: str, model: str) -> Graph:
    recipe = load_recipe("demo", [f"initialise.clip=models:/{model}", "initialise.image_px=64"])
    return draw_graph(recipe, root, uri)


def test_a_registered_model_is_started_from_and_a_moved_alias_is_another_address(
    tmp_path: Path,
) -> None:
    store = TrackingStore.at(f"sqlite:///{tmp_path}/mlflow.db", "evaclip")
    register_random_model(store, tmp_path, "clip", seed=0)
    register_random_model(store, tmp_path, "clip", seed=1)
    graph = graph_of(tmp_path, store.uri, "clip@champion")
    newest = graph.find_step(STAGE)
    made = newest.make_artifact(load_profile(), report_nothing)
    trained, _ = trained_and_evaluated(tmp_path, seed=1)
    assert sha256_of(made.folder / WEIGHTS) == sha256_of(trained.folder / WEIGHTS)
    assert made.counts["clip.expected_gaps"] == 0
    assert [path.name for path in made.folder.iterdir() if path.is_dir()] == ["model"]

    promote_version(store, "clip", "champion", 1, "force", "tests", "back to the first")
    moved = graph_of(tmp_path, store.uri, "clip@champion").find_step(STAGE)
    assert moved.digest != newest.digest
    assert moved.inputs != newest.inputs

    absent = graph_of(tmp_path, store.uri, "clip@production")
    with pytest.raises(InputError, match=r"models:/clip@production: .* there are: clip@challenger"):
        absent.require_runnable("train")
