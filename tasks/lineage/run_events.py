"""What an event of the journal does in MLflow.

Covers: one event at a time, each so that doing it twice changes nothing.
Not here: when they are done (shipper.py), the lines of metrics files (series.py), what makes
events (mlflow_store.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tasks.lineage import model_lineage, stage_record
from tasks.lineage.journal import RUNNING, Event, Journal
from tasks.lineage.metric_series import MAX_METRICS_PER_CALL

if TYPE_CHECKING:
    from mlflow import MlflowClient


def apply(client: MlflowClient, experiment: str, journal: Journal, event: Event) -> None:
    """Do in the store what the event says; doing it twice changes nothing."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

    if event["op"] == "begin":
        _begin(client, experiment, journal, event)
        return
    run = journal.cursor.runs[event["run"]]
    match event["op"]:
        case "params":
            known = client.get_run(run).data.params
            params = [Param(k, v) for k, v in event["params"].items() if k not in known]
            for start in range(0, len(params), 100):
                client.log_batch(run, params=params[start : start + 100])
        case "metrics":
            metrics = [Metric(k, v, event["time"], 0) for k, v in event["metrics"].items()]
            for start in range(0, len(metrics), MAX_METRICS_PER_CALL):
                client.log_batch(run, metrics=metrics[start : start + MAX_METRICS_PER_CALL])
        case "tags":
            _set_tags(client, run, event["tags"])
        case "inputs":
            client.log_inputs(
                run,
                datasets=[
                    DatasetInput(
                        Dataset(**{k: v for k, v in data.items() if k != "context"}),
                        [InputTag("mlflow.data.context", data["context"])],
                    )
                    for data in event["datasets"]
                ],
            )
        case "models":
            model_lineage.apply(client, experiment, run, event, event["time"])
        case "text":
            client.log_text(run, event["text"], event["file"])
        case "file":
            client.log_artifact(run, event["path"], event["folder"])
        case "end":
            client.set_terminated(run, event["status"], event["time"])


def _begin(client: MlflowClient, experiment: str, journal: Journal, event: Event) -> None:
    """Find or make the run of an event's key, and set it to RUNNING."""
    key, tags = event["run"], dict(event["tags"])
    mark = f"{journal.about['key']}/{key}"
    run_id = journal.cursor.runs.get(key)
    if run_id is None:
        # A process killed between making the run and noting its id left it in the store.
        found = client.search_runs([experiment], f"tags.`{stage_record.PREFIX}key` = '{mark}'")
        run_id = found[0].info.run_id if found else None
    if run_id is not None:
        client.update_run(run_id, status=RUNNING)
    else:
        if event["parent"] is not None:
            tags["mlflow.parentRunId"] = journal.cursor.runs[event["parent"]]
        if tags.get(f"{stage_record.PREFIX}reused") == "true":
            tags |= _maker(client, experiment, tags[f"{stage_record.PREFIX}digest"])
        tags[f"{stage_record.PREFIX}key"] = mark
        made = client.create_run(experiment, event["time"], tags, run_name=event["name"])
        run_id = made.info.run_id
    journal.cursor.runs[key] = run_id


def _maker(client: MlflowClient, experiment: str, digest: str) -> dict[str, str]:
    """The tag that links a reused stage to the run that made its artifact, if it is known."""
    made = client.search_runs(
        [experiment],
        f"tags.`{stage_record.PREFIX}digest` = '{digest}' "
        f"and tags.`{stage_record.PREFIX}reused` = 'false'",
        max_results=1,
    )
    return {f"{stage_record.PREFIX}made_by_run": made[0].info.run_id} if made else {}


def _set_tags(client: MlflowClient, run: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run, tags=[RunTag(name, value) for name, value in tags.items()])


def close_killed(client: MlflowClient, journal: Journal) -> None:
    """Show a killed run as killed; the run that continues it sets it back to RUNNING."""
    for key, status in journal.runs().items():
        if status == RUNNING and key in journal.cursor.runs:
            client.set_terminated(journal.cursor.runs[key], "KILLED")
