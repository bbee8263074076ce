"""Runs and experiments that somebody deletes in MLflow's page: nothing that was logged is lost."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from evaclip_model import InputError
from evaclip_model.training.config import JOB_FILE
from tasks.lineage.journal import Journal
from tasks.lineage.shipper import Shipper
from tasks.tracking import TrackingStore

KEY = "train-1"


@pytest.fixture
def store(tmp_path: Path) -> TrackingStore:
    return TrackingStore.at(f"sqlite:///{tmp_path}/mlflow.db", "lineage")


def ship_lines(store: TrackingStore, journal: Journal, root: Path, count: int) -> str:
    """Write `count` more lines of metrics and ship them; returns MLflow's id of the run."""
    file = root / "metrics.jsonl"
    settings = {"samples_seen": 20, "global_batch": 1}
    (root / JOB_FILE).write_text(json.dumps({"train": settings}))
    written = file.read_text().splitlines() if file.exists() else []
    lines = [
        json.dumps({"step": len(written) + n, "loss": 0.5, "time": 1.7e9}) for n in range(count)
    ]
    file.write_text("".join(f"{line}\n" for line in [*written, *lines]))
    journal.append_event({"op": "tags", "run": KEY, "tags": {"lines": str(len(written) + count)}})
    assert Shipper(store, root, journal)._ship_journal(journal, lambda: False)
    return journal.cursor.runs[KEY]


@pytest.mark.parametrize("deleted", ["run", "experiment", "run for good"])
def test_what_is_deleted_between_two_shipments_is_there_after_the_second(
    store: TrackingStore, tmp_path: Path, deleted: str
) -> None:
    about = {"digest": "d", "uri": store.uri, "experiment": store.experiment}
    journal = Journal.create_journal(tmp_path / "journals", about)
    begin = {"op": "begin", "name": "train", "parent": None, "tags": {}, "time": 1}
    journal.append_event({**begin, "run": KEY})
    journal.append_event({"op": "series", "run": KEY, "file": str(tmp_path / "metrics.jsonl")})
    run, client = ship_lines(store, journal, tmp_path, 10), store.client()
    experiment = client.get_run(run).info.experiment_id
    if deleted == "experiment":
        client.delete_experiment(experiment)
    else:
        client.delete_run(run)
    if deleted == "run for good":
        client._tracking_client.store._hard_delete_run(run)
    again = ship_lines(store, journal, tmp_path, 10)
    assert (again == run) is (deleted != "run for good")
    (seen,) = client.search_runs([experiment])
    assert seen.data.tags["lines"] == "20"
    steps = {point.step for point in client.get_metric_history(again, "loss")}
    assert steps == set(range(20))


@pytest.mark.parametrize("shipped", [True, False])
def test_what_waited_for_a_store_is_shipped_to_its_new_address_and_to_no_other(
    tmp_path: Path, shipped: bool
) -> None:
    here = TrackingStore.at(f"sqlite:///{tmp_path}/here/mlflow.db", "lineage")
    about = {"digest": "d", "uri": here.uri, "experiment": here.experiment}
    journal = Journal.create_journal(tmp_path / "journals", about)
    begin = {"op": "begin", "name": "train", "parent": None, "tags": {}}
    journal.append_event({**begin, "run": ""})
    if shipped:
        Shipper(here, tmp_path, journal)._ship_journal(journal, lambda: False)
    else:
        here.client()
    journal.append_event({"op": "end", "run": "", "status": "FINISHED"})
    other = TrackingStore.at(f"sqlite:///{tmp_path}/other/mlflow.db", "lineage")
    Shipper(other, tmp_path, journal).ship_left(journal, lambda: False)
    assert journal.pending == 1 + (not shipped)
    (tmp_path / "here").rename(tmp_path / "moved")
    there = TrackingStore.at(f"sqlite:///{tmp_path}/moved/mlflow.db", "lineage")
    (left,) = Journal.claim_unshipped(tmp_path / "journals")
    Shipper(there, tmp_path, left).ship_left(left, lambda: False)
    client = there.client()
    (seen,) = client.search_runs([there.experiment_id(client)])
    assert seen.info.status == "FINISHED" and (journal.folder / "shipped").exists()


def test_a_database_of_another_mlflow_is_one_sentence_with_the_way_out(
    store: TrackingStore, tmp_path: Path
) -> None:
    store.client()
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("update alembic_version set version_num = 'ffffffffffff'")
    copy = (tmp_path / "mlflow.db").rename(tmp_path / "other.db")  # MLflow knows the first by name
    other = TrackingStore.at(f"sqlite:///{copy}", "lineage")
    for ask in (other.client, other.try_out):
        with pytest.raises(InputError, match=r"another version of MLflow.*'mlflow db upgrade"):
            ask()
