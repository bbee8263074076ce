"""Models of stages in a real MLflow store: each made by a run, read by the next."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, Run

from tasks.artifacts.artifact import Address, Artifact, Made, Stage, produce_artifact
from tasks.lineage.mlflow_store import PipelineRun, Tracking
from tasks.lineage.stage_record import MODEL_TAG, WEIGHTS
from tasks.tracking import TrackingStore


def weights(out: Path) -> Made:
    file = out / WEIGHTS
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    return Made({"steps": 3}, (file,))


def run_stages(pipeline: PipelineRun, root: Path) -> dict[str, Artifact]:
    """Initialise, dataset, two stages of training, evaluation, registration; title -> artifact."""
    made: dict[str, Artifact] = {}

    def stage(title: str, kind: str, config: dict[str, str], **parents: str) -> None:
        digests = {role: made[parent].digest for role, parent in parents.items()}
        address = Address(root, Stage(kind, 1), config, digests)
        with pipeline.stage_run(address, title) as run:
            is_model = kind in ("initialise", "train")
            made[title] = produce_artifact(
                address, weights if is_model else lambda out: Made({"x": 1}, ())
            )
            run.record_artifact(made[title])

    stage("initialise", "initialise", {})
    stage("dataset", "dataset", {})
    stage("train one", "train", {"name": "one"}, start_from="initialise", dataset="dataset")
    stage("train two", "train", {"name": "two"}, start_from="train one", dataset="dataset")
    stage("evaluate", "evaluate", {}, train="train two", initialise="initialise")
    stage("register", "register", {}, train="train two", evaluate="evaluate")
    return made


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def store(root: Path) -> TrackingStore:
    return TrackingStore.at(f"sqlite:///{root}/mlflow.db", "models")


@pytest.fixture(scope="module")
def made(root: Path, store: TrackingStore) -> dict[str, Artifact]:
    """After the pipeline ran twice, the second time with everything there."""
    tracking = Tracking(store, root / "journals", patience_s=60)
    for _ in range(2):
        with tracking.pipeline_run("demo", "r") as pipeline:
            artifacts = run_stages(pipeline, root)
    return artifacts


def first_run(client: MlflowClient, experiment: str, title: str) -> Run:
    query = f"attributes.run_name = '{title}' and tags.`evaclip.reused` = 'false'"
    (found,) = client.search_runs([experiment], query)
    return client.get_run(found.info.run_id)  # a search leaves out models that were read


def test_every_model_is_logged_once_with_its_place_and_links_its_runs(
    store: TrackingStore, made: dict[str, Artifact]
) -> None:
    client = store.client()
    experiment = store.experiment_id(client)
    logged: dict[str, LoggedModel] = {
        one.tags[MODEL_TAG]: one for one in client.search_logged_models([experiment])
    }
    assert set(logged) == {made[title].digest for title in ("initialise", "train one", "train two")}
    for title, start in (("train one", "initialise"), ("train two", "train one")):
        run, model = first_run(client, experiment, title), logged[made[title].digest]
        assert model.source_run_id == run.info.run_id
        assert model.params["sha256"] == made[title].files[WEIGHTS]["sha256"]
        assert Path(model.params["uri"].removeprefix("file://")).is_file()
        assert [one.model_id for one in run.outputs.model_outputs] == [model.model_id]
        started_from = logged[made[start].digest].model_id
        assert [one.model_id for one in run.inputs.model_inputs] == [started_from]
    for title, count in (("evaluate", 2), ("register", 1)):
        read = {one.model_id for one in first_run(client, experiment, title).inputs.model_inputs}
        assert len(read) == count and logged[made["train two"].digest].model_id in read
    judged = client.get_logged_model(logged[made["train two"].digest].model_id)
    assert [(figure.key, figure.value) for figure in judged.metrics] == [("x", 1)]


def test_a_reused_stage_names_the_models_it_was_made_from_and_makes_none(
    store: TrackingStore, made: dict[str, Artifact]
) -> None:
    client = store.client()
    experiment = store.experiment_id(client)
    query = "attributes.run_name = 'train two' and tags.`evaclip.reused` = 'true'"
    (found,) = client.search_runs([experiment], query)
    run = client.get_run(found.info.run_id)
    assert len(run.inputs.model_inputs) == 1
    assert not run.outputs.model_outputs
