"""The run tree, against a real MLflow store on SQLite."""

import json
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from evaclip_model.config import Config
from tasks.artifacts.artifact import Address, Artifact, Made, Stage, produce_artifact
from tasks.lineage.mlflow_store import Tracking
from tasks.tracking import TrackingStore


class Sums(Config):
    rows: int = 3
    sources: tuple[dict[str, str], ...] = ({"name": "noto", "schema": "laion"},)


def made_artifact(root: Path, stage: str, parents: dict[str, str] | None = None) -> Artifact:
    address = address_of(root, stage, parents)

    def make(folder: Path) -> Made:
        (folder / "report.html").write_text("<p>seen</p>")
        return Made({"rows": 3, "dropped.too small": 1}, (folder / "report.html",))

    return produce_artifact(address, make)


def address_of(root: Path, stage: str, parents: dict[str, str] | None = None) -> Address:
    return Address.of(root, Stage(stage, 1), Sums(), parents)


@pytest.fixture
def store(tmp_path: Path) -> TrackingStore:
    return TrackingStore.at(f"sqlite:///{tmp_path}/mlflow.db", "lineage")


@pytest.fixture
def tracking(store: TrackingStore, tmp_path: Path) -> Tracking:
    return Tracking(store, tmp_path / "journals", system_every_s=0.1)


def runs(store: TrackingStore) -> dict[str, list[Run]]:
    """Every run of the experiment by name, oldest first."""
    client = store.client()
    found = client.search_runs([store.experiment_id(client)], order_by=["start_time ASC"])
    named: dict[str, list[Run]] = {}
    for run in found:
        named.setdefault(run.info.run_name, []).append(run)
    return named


def run_pipeline(tracking: Tracking, root: Path) -> None:
    with tracking.pipeline_run(
        "demo",
        "recipe-1",
        recipe='{"port": 1}',
        tags={"mlflow.note.content": "[Prefect](http://127.0.0.1/run)"},
    ) as pipeline:
        with pipeline.stage_run(address_of(root, "merge")) as stage:
            merged = made_artifact(root, "merge")
            stage.record_artifact(merged)
        trained = address_of(root, "train", {"shards": merged.digest})
        with pipeline.stage_run(trained, title="train-1") as stage:
            metrics_file = trained.folder / "metrics.jsonl"
            with stage.follow_metrics(metrics_file):
                trained.folder.mkdir(parents=True, exist_ok=True)
                metrics_file.write_text(
                    "".join(
                        json.dumps({"step": s, "time": 1.7e9 + s, "loss": 5 - s, "sources": {}})
                        + "\n"
                        for s in range(4)
                    )
                )
                time.sleep(0.5)
            artifact = made_artifact(root, "train", {"shards": merged.digest})
            stage.record_artifact(
                artifact, inputs={"training": merged}, attach=[artifact.folder / "report.html"]
            )


def test_a_pipeline_is_one_tree_with_parameters_metrics_datasets_and_artifacts(
    tracking: Tracking, store: TrackingStore, tmp_path: Path
) -> None:
    run_pipeline(tracking, tmp_path / "root")
    found = runs(store)
    client = store.client()
    (pipeline,), (merge,), (train,) = found["demo"], found["merge"], found["train-1"]
    assert {run.info.status for run in (pipeline, merge, train)} == {"FINISHED"}
    assert merge.data.tags["mlflow.parentRunId"] == pipeline.info.run_id
    assert merge.data.params == {"rows": "3", "sources.noto.name": "noto"} | {
        "sources.noto.schema": "laion"
    }
    assert merge.data.metrics == {"rows": 3, "dropped.too small": 1}
    (dataset,) = train.inputs.dataset_inputs
    assert dataset.dataset.digest == merge.data.tags["evaclip.digest"]
    assert Path(json.loads(dataset.dataset.source)["uri"].removeprefix("file://")).is_file()
    losses = client.get_metric_history(train.info.run_id, "loss")
    assert [(point.step, point.value) for point in losses] == [(0, 5), (1, 4), (2, 3), (3, 2)]
    assert losses[0].timestamp == 1_700_000_000_000
    assert "system/cpu_utilization_percentage" in train.data.metrics
    assert [file.path for file in client.list_artifacts(train.info.run_id)] == ["report.html"]
    assert '"port": 1' in client_text(client, pipeline.info.run_id, "recipe.json", tmp_path)
    assert "(http://127.0.0.1/run)" in pipeline.data.tags["mlflow.note.content"]


def client_text(client: MlflowClient, run: str, file: str, folder: Path) -> str:
    return Path(client.download_artifacts(run, file, str(folder))).read_text()


def test_a_second_execution_tags_what_it_reused_and_names_the_run_that_made_it(
    tracking: Tracking, store: TrackingStore, tmp_path: Path
) -> None:
    run_pipeline(tracking, tmp_path / "root")
    run_pipeline(tracking, tmp_path / "root")
    found = runs(store)
    assert len(found["demo"]) == 2
    first, second = found["train-1"]
    assert first.data.tags["evaclip.reused"] == "false"
    assert second.data.tags["evaclip.reused"] == "true"
    assert second.data.tags["evaclip.made_by_run"] == first.info.run_id
    assert "loss" not in second.data.metrics


def test_a_stage_entered_twice_is_one_run(
    tracking: Tracking, store: TrackingStore, tmp_path: Path
) -> None:
    with tracking.pipeline_run("demo", "r") as pipeline:
        for _ in range(2):
            with pipeline.stage_run(address_of(tmp_path, "merge")) as stage:
                stage.record_artifact(made_artifact(tmp_path, "merge"))
    (merge,) = runs(store)["merge"]
    assert merge.data.tags["evaclip.reused"] == "false"
    assert len(store.client().get_metric_history(merge.info.run_id, "rows")) == 1


def test_a_failing_stage_is_failed_and_says_why(
    tracking: Tracking, store: TrackingStore, tmp_path: Path
) -> None:
    with (
        pytest.raises(ValueError, match="no rows"),
        tracking.pipeline_run("demo", "r") as pipeline,
        pipeline.stage_run(address_of(tmp_path, "merge")),
    ):
        raise ValueError("no rows are left")
    (merge,), (pipeline_run,) = runs(store)["merge"], runs(store)["demo"]
    assert (merge.info.status, pipeline_run.info.status) == ("FAILED", "FAILED")
    assert merge.data.tags["evaclip.error"] == "no rows are left"


KILLED_IN_TRAINING = """
    import json, sys, time
    from pathlib import Path
    from evaclip_model.config import Config
    from tasks.artifacts.artifact import Address, Stage
    from tasks.lineage.mlflow_store import Tracking
    from tasks.tracking import TrackingStore

    folder = Path(sys.argv[1])
    address = Address(folder, Stage("train", 1), {})
    store = TrackingStore.at(f"sqlite:///{folder}/mlflow.db", "lineage")
    with Tracking(store, folder / "journals").pipeline_run("demo", "r") as pipeline:
        with pipeline.stage_run(address) as stage:
            address.folder.mkdir(parents=True, exist_ok=True)
            with stage.follow_metrics(address.folder / "metrics.jsonl"):
                with (address.folder / "metrics.jsonl").open("a") as file:
                    for step in map(int, sys.argv[2].split(",")):
                        file.write(json.dumps({"step": step, "time": 1.0, "loss": step}) + "\\n")
                stage.run_id(60)
                print("followed", flush=True)
                time.sleep(float(sys.argv[3]))
"""


def run_child(folder: Path, steps: str, stay_s: float) -> subprocess.Popen[str]:
    code = textwrap.dedent(KILLED_IN_TRAINING)
    command = [sys.executable, "-c", code, str(folder), steps, str(stay_s)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "followed\n"
    return child


def test_a_killed_run_is_continued_and_every_step_is_there_once(
    store: TrackingStore, tmp_path: Path
) -> None:
    child = run_child(tmp_path, "0,1,2,3", 60)
    time.sleep(2.5)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert runs(store)["demo"][0].info.status == "RUNNING"
    tracking = Tracking(store, tmp_path / "journals")
    assert tracking.has_unfinished("r") and not tracking.has_unfinished("another recipe")
    metrics = tmp_path / "train" / Address(tmp_path, Stage("train", 1), {}).digest / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:2]))
    assert run_child(tmp_path, "2,3,4", 0).wait() == 0
    found = runs(store)
    ((train,), (pipeline,)) = found["train"], found["demo"]
    assert (train.info.status, pipeline.info.status) == ("FINISHED", "FINISHED")
    assert not tracking.has_unfinished("r")
    history = store.client().get_metric_history(train.info.run_id, "loss")
    assert [point.step for point in history] == [0, 1, 2, 3, 4]


def test_another_recipe_shows_the_killed_run_as_killed(
    store: TrackingStore, tracking: Tracking, tmp_path: Path
) -> None:
    child = run_child(tmp_path, "0", 60)
    child.send_signal(signal.SIGKILL)
    child.wait()
    with tracking.pipeline_run("other", "another recipe"):
        pass
    found = runs(store)
    assert found["other"][0].info.status == "FINISHED"
    assert {found[name][0].info.status for name in ("demo", "train")} == {"KILLED"}


def test_a_hook_shows_a_killed_run_as_killed_once_it_is_dead_and_it_can_still_be_continued(
    store: TrackingStore, tracking: Tracking, tmp_path: Path
) -> None:
    child = run_child(tmp_path, "0", 60)
    tracking.close_killed()
    assert {runs(store)[name][0].info.status for name in ("demo", "train")} == {"RUNNING"}
    child.send_signal(signal.SIGKILL)
    child.wait()
    tracking.close_killed()
    assert {runs(store)[name][0].info.status for name in ("demo", "train")} == {"KILLED"}
    assert run_child(tmp_path, "1", 0).wait() == 0
    assert [run.info.status for run in runs(store)["demo"]] == ["FINISHED"]


def test_work_goes_on_when_the_store_is_away_and_a_later_run_ships_what_waited(
    tmp_path: Path,
) -> None:
    database = tmp_path / "later" / "mlflow.db"
    database.parent.write_text("a file, where the store's folder should be")
    store = TrackingStore.at(f"sqlite:///{database}", "lineage")
    tracking = Tracking(store, tmp_path / "journals", patience_s=5, system_every_s=0.1)
    started = time.monotonic()
    run_pipeline(tracking, tmp_path / "root")
    assert time.monotonic() - started < 8
    database.parent.unlink()
    with Tracking(store, tmp_path / "journals", patience_s=120).pipeline_run("other", "recipe-2"):
        pass
    found = runs(store)
    (train,) = found["train-1"]
    assert train.info.status == "FINISHED"
    assert train.data.metrics["loss"] == 2
    assert train.data.tags["evaclip.reused"] == "false"


def test_a_server_that_accepts_and_never_answers_delays_a_run_by_its_patience_only(
    tmp_path: Path,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent_server:
        store = TrackingStore.at(f"http://127.0.0.1:{silent_server.getsockname()[1]}", "lineage")
        tracking = Tracking(store, tmp_path / "journals", patience_s=1)
        started = time.monotonic()
        with tracking.pipeline_run("demo", "r") as pipeline:
            assert pipeline.run_id(wait_s=0.1) is None
        assert time.monotonic() - started < 4


def test_mlflow_is_imported_whole_before_a_second_thread_uses_it(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from tasks.lineage.mlflow_store import Tracking
from tasks.tracking import TrackingStore
assert "mlflow" not in sys.modules
store = TrackingStore.at("sqlite:///{tmp_path}/mlflow.db", "e")
with Tracking(store, Path("{tmp_path}/journals")).pipeline_run("demo", "r"):
    before = {{name for name in sys.modules if name.startswith("mlflow")}}
    from mlflow import pyfunc
    store.client().search_registered_models()
late = {{name for name in sys.modules if name.startswith("mlflow")}} - before
print([name for name in late if not name.startswith("mlflow.store.db.")])  # database migrations
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
