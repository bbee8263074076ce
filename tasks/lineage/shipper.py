"""From a journal to MLflow: the thread that does it while work goes on, and how.

Covers: order, waiting for a store that is away, what earlier runs left behind; what each event does
in the store, and the new lines of metrics files, each so that doing it twice changes nothing.
Not here: what makes events (mlflow_store.py), logged models (stage_record.py), the journal's
files (journal.py).
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.lineage import stage_record
from tasks.lineage.journal import RUNNING, Event, Journal, SeriesCursor, now_ms
from tasks.tracking import TrackingStore, is_answer, is_refusal, restore_experiment, restore_run

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

MAX_METRICS_PER_CALL = 1000
POLL_S = 1.0
LONGEST_BACKOFF_S = 30.0
LEFTOVERS_S = 10.0
"""How long what earlier runs left may keep back the events of a run that is at work."""
_log = logging.getLogger(__name__)


class RunGoneError(Exception):
    """The store has a run no longer, not even as deleted."""


class Shipper(threading.Thread):
    """Applies a journal's events to the store, in order, in the background, until `finish`."""

    def __init__(self, store: TrackingStore, journals: Path, journal: Journal) -> None:
        """Nothing is contacted yet.

        Args:
            store: where events go.
            journals: folder of all journals, with what earlier runs left.
            journal: of this run.
        """
        super().__init__(name="lineage", daemon=True)
        self._store = store
        self._journals = journals
        self._journal = journal
        self._changed = threading.Event()
        self._closing = threading.Event()
        self._abandoned = threading.Event()
        self._shipped_one = threading.Condition()
        self._client: MlflowClient | None = None
        self._last_error: Exception | None = None
        self._experiments: dict[str, str] = {}

    @property
    def experiment(self) -> str | None:
        """The experiment's id, once the store was reached."""
        return self._experiments.get(self._store.experiment)

    def wake(self) -> None:
        """There is an event to ship."""
        self._changed.set()

    def run_id(self, key: str, wait_s: float) -> str | None:
        """MLflow's id of a run by its key, or None when that is not known within `wait_s`."""
        with self._shipped_one:
            self._shipped_one.wait_for(lambda: key in self._journal.cursor.runs, wait_s)
            return self._journal.cursor.runs.get(key)

    def ship_rest(self, patience_s: float) -> None:
        """Ship the rest, for at most `patience_s` seconds, or at most until the store fails."""
        self._closing.set()
        self.wake()
        self.join(patience_s)
        self._abandoned.set()
        waiting = self._journal.pending
        if waiting:
            _log.warning(
                "%d tracking events wait in %s: the next run ships them (%s does not answer: %s)",
                waiting,
                self._journal.folder,
                self._store.uri,
                str(self._last_error)[:200],
            )

    def run(self) -> None:
        backoff, leftovers = POLL_S, True
        try:
            while True:
                closing = self._closing.is_set()
                self._changed.clear()
                try:
                    self._ship_journal(self._journal, self._abandoned.is_set)
                    backoff = POLL_S
                    if leftovers or closing:
                        leftovers = self._ship_leftovers(closing)
                    if closing:
                        return
                except Exception as error:  # the store may fail in any way; work must go on
                    self._last_error = error
                    self._experiments.clear()
                    backoff = min(backoff * 2, LONGEST_BACKOFF_S)
                    if closing:
                        return
                    self._closing.wait(backoff)
                else:
                    self._changed.wait(backoff)
        finally:
            self._journal.release()

    def _ship_leftovers(self, closing: bool) -> bool:
        """Ship what earlier runs could not, and close in the store what was killed.

        Meanwhile this run's own events wait, so that until it closes there is a limit of time;
        returns whether something is left.
        """
        until = time.monotonic() + (float("inf") if closing else LEFTOVERS_S)

        def give_up() -> bool:
            return self._abandoned.is_set() or time.monotonic() > until

        for left in Journal.claim_unshipped(self._journals):
            if give_up():
                left.release()
                return True
            self.ship_left(left, give_up)
        return False

    def ship_left(self, left: Journal, give_up: Callable[[], bool]) -> None:
        """Ship one journal that an earlier run left, close in the store what was killed, let the
        journal go. One that can never be shipped must not keep back others: nothing is raised."""
        try:
            if left.about["uri"] != self._store.uri:
                return
            if self._ship_journal(left, give_up) and not left.is_closed:
                close_killed(self._connect_client(), left)
        except Exception as error:
            self._last_error = error
            _log.warning("%s waits for another run: %s", left.folder, str(error)[:200])
        finally:
            left.release()

    def _connect_client(self) -> MlflowClient:
        if self._client is None:
            self._client = self._store.client()
        return self._client

    def _experiment_id(self, client: MlflowClient, name: str) -> str:
        if name not in self._experiments:
            self._experiments[name] = TrackingStore(self._store.uri, name).experiment_id(client)
        return self._experiments[name]

    def _ship_journal(self, journal: Journal, give_up: Callable[[], bool]) -> bool:
        """Apply the journal's events that wait; False when `give_up()` ended it early."""
        while True:
            try:
                return self._ship_waiting(journal, give_up)
            except RunGoneError as error:
                key = str(error)
                _log.warning("run '%s' is gone from %s: it is made anew", key, self._store.uri)
                journal.cursor.forget_run(key)
                self._experiments.clear()

    def _ship_waiting(self, journal: Journal, give_up: Callable[[], bool]) -> bool:
        client, cursor = self._connect_client(), journal.cursor
        experiment = self._experiment_id(client, journal.about["experiment"])
        for offset, event in journal.iterate_events(cursor.offset):
            if give_up():
                return False
            if event["op"] == "end" and not ship_series(client, journal, event["run"], give_up):
                return False
            try:
                write_persistently(
                    client,
                    journal,
                    event["run"],
                    partial(apply_event, client, experiment, journal, event),
                )
            except (FileNotFoundError, KeyError) as error:
                _log.warning("tracking event %s skipped: %s", event["op"], error)
            except Exception as error:
                if event["op"] != "begin" or not is_refusal(error):
                    raise
                restore_experiment(client, experiment)
                apply_event(client, experiment, journal, event)
            with self._shipped_one:
                cursor.offset = offset
                journal.save_cursor()
                self._shipped_one.notify_all()
        if not all(ship_series(client, journal, key, give_up) for key in cursor.runs):
            return False
        if journal.is_closed:
            journal.mark_shipped()
        return True


def write_persistently(
    client: MlflowClient, journal: Journal, key: str, write: Callable[[], None]
) -> None:
    """Write to the run of `key`; where the store refuses, restore the run and write once more.

    What is refused even so is said in the log, and work goes on.

    Raises:
        RunGoneError: with the key of a run that cannot be restored.
    """
    for is_last in (False, True):
        try:
            write()
            return
        except Exception as error:
            run = journal.cursor.runs.get(key)
            if run is None or not is_answer(client, error):
                raise
            if is_last:
                _log.warning("tracking store refused to write: %s", str(error)[:300])
            elif not restore_run(client, run):
                raise RunGoneError(key) from error


def apply_event(client: MlflowClient, experiment: str, journal: Journal, event: Event) -> None:
    """Do in the store what the event says; doing it twice changes nothing."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

    if event["op"] == "begin":
        _begin_run(client, experiment, journal, event)
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
            client.log_batch(run, tags=[RunTag(k, v) for k, v in event["tags"].items()])
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
            stage_record.apply_event(client, experiment, run, event, event["time"])
        case "text":
            client.log_text(run, event["text"], event["file"])
        case "file":
            client.log_artifact(run, event["path"], event["folder"])
        case "series":
            journal.cursor.open_series(event["run"], event["file"])
        case "end":
            client.set_terminated(run, event["status"], event["time"])
            journal.cursor.close_series(event["run"])


def _begin_run(client: MlflowClient, experiment: str, journal: Journal, event: Event) -> None:
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
            tags |= _maker_tag(client, experiment, tags[f"{stage_record.PREFIX}digest"])
        tags[f"{stage_record.PREFIX}key"] = mark
        made = client.create_run(experiment, event["time"], tags, run_name=event["name"])
        run_id = made.info.run_id
    journal.cursor.runs[key] = run_id


def _maker_tag(client: MlflowClient, experiment: str, digest: str) -> dict[str, str]:
    """The tag that links a reused stage to the run that made its artifact, if it is known."""
    made = client.search_runs(
        [experiment],
        f"tags.`{stage_record.PREFIX}digest` = '{digest}' "
        f"and tags.`{stage_record.PREFIX}reused` = 'false'",
        max_results=1,
    )
    return {f"{stage_record.PREFIX}made_by_run": made[0].info.run_id} if made else {}


def close_killed(client: MlflowClient, journal: Journal) -> None:
    """Show a killed run as killed; the run that continues it sets it back to RUNNING."""
    for key, status in journal.run_statuses().items():
        if status == RUNNING and key in journal.cursor.runs:
            client.set_terminated(journal.cursor.runs[key], "KILLED")


def ship_series(
    client: MlflowClient, journal: Journal, key: str, give_up: Callable[[], bool]
) -> bool:
    """Send the new lines of a run's metrics files; False when `give_up()` ended it early.

    A batch that is sent twice, because its answer was lost, changes nothing: the database knows a
    point by all it says, its time included.
    """
    run, cursor = journal.cursor.runs.get(key), journal.cursor
    for file in cursor.files_of(key) if run else ():
        name = f"{key}|{file}"
        for points, reached in iterate_batches(file, cursor.series[name]):
            if points:
                write = partial(client.log_batch, run, metrics=points)
                write_persistently(client, journal, key, write)
            if cursor.series[name] != reached:
                cursor.series[name] = reached
                journal.save_cursor()
            if give_up():
                return False
    return True


def iterate_batches(file: Path, at: SeriesCursor) -> Iterator[tuple[list[Metric], SeriesCursor]]:
    """New lines as points, as many as one request may hold, each time with the cursor behind."""
    from mlflow.entities import Metric

    points: list[Metric] = []
    reached = at
    for here, line in _new_lines(file, at):
        step, shipped = line.get("step"), reached.step
        more: list[Metric] = []
        if isinstance(step, int) and step > shipped:
            shipped, stamp = step, _parse_time_ms(line.get("time"))
            more = [Metric(k, v, stamp, step) for k, v in stage_record.series_metrics(line).items()]
        if points and len(points) + len(more) > MAX_METRICS_PER_CALL:
            yield points, reached
            points = []
        points += more
        reached = replace(here, step=shipped)
    yield points, reached


def _new_lines(file: Path, at: SeriesCursor) -> Iterator[tuple[SeriesCursor, dict[str, Any]]]:
    """Whole lines behind `at`, or all when the file was cut back meanwhile; each with its end."""
    if not file.exists():
        return
    with file.open("rb") as stream:
        inode, offset = os.fstat(stream.fileno()).st_ino, at.offset
        stream.seek(max(offset - 1, 0))
        if inode != at.file or (offset and stream.read(1) != b"\n"):
            offset = 0
        stream.seek(offset)
        for line in stream:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            with suppress(ValueError):
                parsed = json.loads(line)
                if isinstance(parsed, dict):
                    yield replace(at, offset=offset, file=inode), parsed


def _parse_time_ms(value: object) -> int:
    """A line's time (UNIX seconds or ISO 8601) in milliseconds; now when it has none."""
    if isinstance(value, int | float):
        return int(value * 1000)
    if isinstance(value, str):
        with suppress(ValueError):
            return int(datetime.fromisoformat(value).timestamp() * 1000)
    return now_ms()
