"""Runs as OpenLineage events: a file that follows the specification, and never stops a run.

The rules checked here are the specification's (2-0-2) and its facets'.
"""

from __future__ import annotations

import json
import re
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tasks.artifacts.artifact import Address, Made, Stage, produce_artifact
from tasks.lineage.mlflow_store import Tracking
from tasks.tracking import TrackingStore

FACET_URL = re.compile(r"https://openlineage\.io/spec/facets/\d+-\d+-\d+/(\w+)\.json#/\$defs/\1")
NEEDED = {
    "parent": {"run", "job"},
    "errorMessage": {"message", "programmingLanguage"},
    "jobType": {"processingType", "integration", "jobType"},
    "version": {"datasetVersion"},
    "outputStatistics": {"rowCount", "size", "fileCount"},
}


def away(folder: Path) -> Tracking:
    """Tracking whose MLflow cannot be reached: the file does not wait for it."""
    (folder / "store").write_text("a file, where the store's folder should be")
    store = TrackingStore.at(f"sqlite:///{folder}/store/mlflow.db", "e")
    events = folder / "out" / "events.jsonl"
    return Tracking(store, folder / "journals", patience_s=0.1, openlineage=events)


def run_twice(folder: Path) -> list[dict[str, Any]]:
    """A merge, a download made of it, and a third stage that fails; then once more without it."""
    root = folder / "runs"
    tracking = away(folder)

    def make(out: Path) -> Made:
        (out / "rows").write_text("rows")
        return Made({"rows": 3}, (out / "rows",))

    merge = Address(root, Stage("merge", 1), {}, {"laion2b": "f" * 16})
    download = Address(root, Stage("download", 1), {}, {"merge": merge.digest})
    verify = Address(root, Stage("verify", 1), {}, {"download": download.digest})
    for attempt in range(2):
        try:
            with tracking.pipeline_run("pipeline demo", "r") as pipeline:
                for address in (merge, download):
                    with pipeline.stage_run(address) as stage:
                        stage.record_artifact(produce_artifact(address, make))
                if not attempt:
                    with pipeline.stage_run(verify):
                        raise ValueError("https://me:secret@127.0.0.1/ does not answer")
        except ValueError:
            assert not attempt
    lines = (folder / "out" / "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_twice(tmp_path_factory.mktemp("events"))


def test_every_event_has_what_the_specification_demands(events: list[dict[str, Any]]) -> None:
    for event in events:
        assert event["eventType"] in ("START", "RUNNING", "COMPLETE", "ABORT", "FAIL", "OTHER")
        assert datetime.fromisoformat(event["eventTime"]).tzinfo is not None
        assert event["schemaURL"] == (
            "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent"
        )
        assert re.match(r"[a-z]+:\S+$", event["producer"])
        uuid.UUID(event["run"]["runId"])
        datasets = event["inputs"] + event["outputs"]
        assert all(one["namespace"] and one["name"] for one in (event["job"], *datasets))
        facets = [event["run"]["facets"], event["job"]["facets"]]
        facets += [one["facets"] for one in datasets]
        facets += [one["outputFacets"] for one in event["outputs"]]
        for key, facet in (pair for some in facets for pair in some.items()):
            assert FACET_URL.fullmatch(facet["_schemaURL"]) and facet["_producer"]
            assert set(facet) == NEEDED[key] | {"_schemaURL", "_producer"}


def test_every_run_starts_and_ends_once_under_its_pipeline(events: list[dict[str, Any]]) -> None:
    by_run: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        by_run.setdefault(event["run"]["runId"], []).append(event)
    told = {
        tuple([some[0]["job"]["name"], *(one["eventType"] for one in some)])
        for some in by_run.values()
    }
    assert told == {
        ("pipeline demo", "START", "FAIL"),
        ("pipeline demo.merge", "START", "COMPLETE"),
        ("pipeline demo.download", "START", "COMPLETE"),
        ("pipeline demo.verify", "START", "FAIL"),
        ("pipeline demo", "START", "COMPLETE"),
    }, "stages that are there already are not run"
    for some in by_run.values():
        above = some[0]["run"]["facets"].get("parent")
        if "." in some[0]["job"]["name"]:
            assert by_run[above["run"]["runId"]][0]["job"]["name"] == above["job"]["name"]


def test_what_one_stage_makes_another_reads(events: list[dict[str, Any]]) -> None:
    ends = {one["job"]["name"]: one for one in events if one["eventType"] == "COMPLETE"}
    merge, download = ends["pipeline demo.merge"], ends["pipeline demo.download"]
    (made,), (read,) = merge["outputs"], download["inputs"]
    for key in ("namespace", "name", "facets"):
        assert made[key] == read[key]
    assert made["outputFacets"]["outputStatistics"]["rowCount"] == 3
    (source,) = merge["inputs"]
    assert source["name"] == "outside/merge.laion2b"
    assert source["facets"]["version"]["datasetVersion"] == "f" * 16


def test_an_error_is_told_without_its_password(events: list[dict[str, Any]]) -> None:
    (failed,) = [
        one for one in events if one["eventType"] == "FAIL" and "verify" in one["job"]["name"]
    ]
    message = failed["run"]["facets"]["errorMessage"]["message"]
    assert message == "https://me:***@127.0.0.1/ does not answer"


def test_a_file_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file, where the events' folder should be")
    tracking = away(tmp_path)
    with tracking.pipeline_run("demo", "r"):
        pass
