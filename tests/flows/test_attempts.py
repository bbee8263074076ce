"""Earlier registrations that a retraining goes on from, whatever became of the registry."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from evaclip_model import InputError
from flows.config.recipe import Recipe, load_recipe
from flows.graph.graph import draw_graph
from flows.graph.incremental import News, find_new_data
from flows.graph.outside_data import hash_marks
from flows.promotion import apply_decision
from tasks.artifacts.artifact import Address, Artifact, Made, Role, Stage, produce_artifact
from tasks.register.config import STAGE as REGISTER
from tasks.register.gate import Candidate, decide_promotion
from tasks.register.promotion import (
    DIGEST_TAG,
    carry_out,
    champion_of,
    promote_version,
    standing_of,
    write_decision,
)
from tasks.tracking import TrackingStore

RECIPE = load_recipe("demo")
NAME = RECIPE.registry.model_name
FIRST = decide_promotion(Candidate(weights="w", bytes=1, headlines=()), None, RECIPE.registry.gate)


def make_artifact(root: Path, kind: str, parents: Mapping[str, str]) -> Artifact:
    address = Address(root, Stage(kind, 1), {}, parents)
    return produce_artifact(address, lambda out: Made({"selected": 1}, ()))


def make_champion(recipe: Recipe, root: Path, store: TrackingStore, verify: Artifact) -> None:
    """A first model of verified data, from dataset to registration, that is champion."""
    dataset = make_artifact(root, "dataset", {Role.DATA: verify.digest})
    train = make_artifact(root, "train", {Role.DATASET: dataset.digest})
    client = store.client()
    client.create_registered_model(NAME)
    client.create_model_version(NAME, "file:///nothing", tags={DIGEST_TAG: train.digest})
    made_from = {Role.TRAINED: train.digest, Role.TRACKING: hash_marks([store.uri])}
    produce_artifact(
        Address.of(root, REGISTER, recipe.registry, made_from),
        lambda out: Made({"version": 1}, write_decision(store, NAME, 1, FIRST, out)),
    )
    assert carry_out(store, recipe.registry, 1, FIRST)


def find_news(root: Path) -> News:
    """What is new where no source has any file."""
    store = TrackingStore.at(f"sqlite:///{root}/mlflow.db", "e")
    merge = RECIPE.merge.model_copy(update={"sources": ()})
    recipe: Recipe = RECIPE.model_copy(update={"merge_table": merge})
    graph = draw_graph(RECIPE, root, store.uri)
    return find_new_data(recipe, graph, store, keep_rejected=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A first model, from merge to registration, that is champion."""
    root = tmp_path / "runs"
    store = TrackingStore.at(f"sqlite:///{root}/mlflow.db", "e")
    merge = make_artifact(root, "merge", {})
    download = make_artifact(root, "download", {Role.MERGE: merge.digest})
    verify = make_artifact(root, "verify", {Role.DOWNLOAD: download.digest})
    make_champion(RECIPE, root, store, verify)
    return root


def test_a_registration_is_found_after_its_registry_moved(root: Path) -> None:
    here = find_news(root)
    moved = root.rename(root.with_name("elsewhere"))
    there = find_news(moved)
    assert there.start and here.start and there.start.digest == here.start.digest
    assert [part.digest for part in there.used] == [part.digest for part in here.used]
    assert there.is_nothing and there.last and there.last.version == 1


def test_numbers_of_another_registry_mean_other_models(root: Path) -> None:
    root = root.rename(root.with_name("elsewhere"))
    (root / "mlflow.db").unlink()
    client = TrackingStore.at(f"sqlite:///{root}/mlflow.db", "e").client()
    client.create_registered_model(NAME)
    client.create_model_version(NAME, "file:///nothing", tags={DIGEST_TAG: 16 * "0"})
    assert find_news(root).last is None


@pytest.mark.parametrize("deleted", ["alias", "version", "model"])
def test_without_its_champion_a_retraining_does_not_begin_anew(root: Path, deleted: str) -> None:
    client = TrackingStore.at(f"sqlite:///{root}/mlflow.db", "e").client()
    if deleted == "alias":
        client.delete_registered_model_alias(NAME, RECIPE.registry.alias)
    elif deleted == "version":
        client.delete_model_version(NAME, "1")
    else:
        client.delete_registered_model(NAME)
    with pytest.raises(InputError, match=r"no version of .* is champion"):
        find_news(root)


@pytest.mark.parametrize("promote", [True, False])
def test_an_answer_that_comes_after_another_version_became_champion_promotes_nothing_unseen(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], promote: bool
) -> None:
    store = TrackingStore.at(f"sqlite:///{root}/mlflow.db", "e")
    for _ in range(2):
        store.client().create_model_version(NAME, "file:///nothing")
    better = FIRST.model_copy(update={"champion": 1})
    registered = produce_artifact(
        Address.of(root, REGISTER, RECIPE.registry, {Role.TRAINED: 16 * "2"}),
        lambda out: Made({"version": 2}, write_decision(store, NAME, 2, better, out)),
    )
    promote_version(store, NAME, "champion", 3, "force", "Bob", "at once")
    said = json.dumps({"promote": promote, "by": "Ada", "why": "hm"})
    key = f"suspended-approve-{NAME}-2-response"
    given = [SimpleNamespace(key=key, value=said)]
    monkeypatch.setattr(apply_decision, "filter_flow_run_input", lambda *_, **__: given)
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", "of a test")
    monkeypatch.setenv("EVACLIP_ROOT", str(root))
    monkeypatch.setenv("EVACLIP_TRACKING_URI", store.uri)
    answered = apply_decision.carry_out_answer("demo", (), "ask")
    assert answered is not None and answered.digest == registered.digest
    champion = champion_of(store, NAME, "champion")
    assert champion is not None and champion.version == 3
    assert "Ada's answer on evaclip-demo/2 moves nothing" in capsys.readouterr().out
    declined = standing_of(store, NAME, 2).declined
    assert declined == ("" if promote else "Ada: hm")
