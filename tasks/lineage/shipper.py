"""From a journal to MLflow: the thread that does it while work goes on, what earlier runs left
behind, and what each event and each new line of metrics does in the store; doing it twice changes
nothing. Not here: what makes events (mlflow_store.py), logged models (stage_record.py)."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from evaclip_model.training.config import JOB_FILE
from tasks.lineage import stage_record
from tasks.lineage.journal import RUNNING, SHIPPED, Event, Journal
from tasks.lineage.stage_record import PREFIX
from tasks.tracking import TrackingStore, find_answer, is_answer, restore_run

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

POLL_S = 1.0
LONGEST_BACKOFF_S = 30.0
LEFTOVERS_S = 10.0
"""How long what earlier runs left may keep back the events of a run that is at work."""
PARTS = 100
"""Of a training's steps, from each of which the store gets points."""
_log = logging.getLogger(__name__)


class RunGoneError(Exception):
    """The store has a run no longer, not even as deleted."""


class Shipper(threading.Thread):
    """Applies a journal's events to the store, in order, in the background, until `ship_rest`;
    `journals` is the folder of all, also those left over."""

    def __init__(self, store: TrackingStore, journals: Path, journal: Journal) -> None:
        super().__init__(name="lineage", daemon=True)
        self.store = store
        self.journal = journal
        self._journals = journals
        self._changed = threading.Event()
        self._closing = threading.Event()
        self._abandoned = threading.Event()
        self._shipped_one = threading.Condition()
        self._last_error: Exception | None = None
        self._experiments: dict[str, str] = {}
        self._series: dict[str, MetricsSeries] = {}

    @property
    def experiment(self) -> str | None:
        """The experiment's id, once the store was reached."""
        return self._experiments.get(self.store.experiment)

    def wake(self) -> None:
        """There is an event to ship."""
        self._changed.set()

    def run_id(self, key: str, wait_s: float) -> str | None:
        """MLflow's id of a run by its key, or None when that is not known within `wait_s`."""
        with self._shipped_one:
            self._shipped_one.wait_for(lambda: key in self.journal.cursor.runs, wait_s)
            return self.journal.cursor.runs.get(key)

    def ship_rest(self, patience_s: float) -> None:
        """Ship the rest, for at most `patience_s` seconds, or at most until the store fails."""
        self._closing.set()
        self.wake()
        self.join(patience_s)
        self._abandoned.set()
        if waiting := self.journal.pending:
            _log.warning(
                "%d tracking events wait in %s: the next run ships them (%s does not answer: %s)",
                *(waiting, self.journal.folder, self.store.uri, str(self._last_error)[:200]),
            )

    def run(self) -> None:
        backoff, leftovers = POLL_S, True
        try:
            while True:
                closing = self._closing.is_set()
                self._changed.clear()
                try:
                    self._ship_journal(self.journal, self._abandoned.is_set)
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
            self.journal.release()

    def _ship_leftovers(self, closing: bool) -> bool:
        """Ship what earlier runs could not, and close in the store what was killed; returns whether
        something is left. This run's own events wait, so that there is a limit of time until it
        closes."""
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
        """Ship one journal that an earlier run left, show killed runs in the store as killed (the
        run that continues them sets them back to RUNNING), let the journal go. One that can never
        be shipped must not keep back others: nothing is raised."""
        try:
            if not self._is_of_store(left):
                return
            if self._ship_journal(left, give_up) and not left.is_closed:
                for key, status in left.run_statuses().items():
                    if status == RUNNING and key in left.cursor.runs:
                        run = left.cursor.runs[key]
                        self._client.set_terminated(run, "KILLED")
        except Exception as error:
            self._last_error = error
            _log.warning("%s waits for another run: %s", left.folder, str(error)[:200])
        finally:
            left.release()

    def _is_of_store(self, left: Journal) -> bool:
        """Tell whether a journal is of this store, maybe under another address: one that knows its
        runs, or of a database that is at its place no longer."""
        before = TrackingStore(left.about["uri"], "")
        if before.uri == self.store.uri:
            return True
        if left.cursor.runs:
            ask = self._client.get_run
            return any(find_answer(ask, run) is not None for run in left.cursor.runs.values())
        return before.database is not None and not before.database.exists()

    @cached_property
    def _client(self) -> MlflowClient:
        return self.store.client()

    def _ship_journal(self, journal: Journal, give_up: Callable[[], bool]) -> bool:
        """Apply the journal's events that wait; False when `give_up()` ended it early."""
        while True:
            try:
                return self._ship_waiting(journal, give_up)
            except RunGoneError as error:
                key = str(error)
                _log.warning("run '%s' is gone from %s: it is made anew", key, self.store.uri)
                journal.cursor.forget_run(key)
                self._experiments.clear()
                self._series.clear()

    def _ship_waiting(self, journal: Journal, give_up: Callable[[], bool]) -> bool:
        client, cursor, name = self._client, journal.cursor, journal.about["experiment"]
        if name not in self._experiments:
            self._experiments[name] = TrackingStore(self.store.uri, name).experiment_id(client)
        experiment = self._experiments[name]
        for offset, event in journal.iterate_events(cursor.offset):
            key = event["run"]
            if give_up():
                return False
            if event["op"] == "end" and not self._ship_series(client, journal, key, give_up):
                return False
            write = partial(apply_event, client, experiment, journal, event)
            try:
                write_persistently(client, journal, key, write)
            except (FileNotFoundError, KeyError) as error:
                _log.warning("tracking event %s skipped: %s", event["op"], error)
            with self._shipped_one:
                cursor.offset = offset
                journal.save_cursor()
                self._shipped_one.notify_all()
        if not all(self._ship_series(client, journal, key, give_up) for key in cursor.runs):
            return False
        if journal.is_closed:
            (journal.folder / SHIPPED).touch()
        return True

    def _ship_series(
        self, client: MlflowClient, journal: Journal, key: str, give_up: Callable[[], bool]
    ) -> bool:
        """Send what is new in a run's files of metrics; False when `give_up()` ended it early. A
        line whose answer was lost may be sent twice: the database knows a point by all it says."""
        run, steps = journal.cursor.runs.get(key, ""), journal.cursor.steps.get(key, {})
        for file, shipped in list(steps.items()) if run else ():
            name = f"{journal.folder}|{key}|{file}"
            series = self._series.setdefault(name, MetricsSeries(Path(file)))
            for points, step in series.iterate_points(shipped):
                write = partial(stage_record.log_points, client, run, points)
                write_persistently(client, journal, key, write)
                steps[file] = step
                journal.save_cursor()
                if give_up():
                    return False
        return True


def write_persistently(
    client: MlflowClient, journal: Journal, key: str, write: Callable[[], None]
) -> None:
    """Write to the run of `key`; where the store refuses, restore the run and write once more. What
    is refused even so is logged; RunGoneError has the key of a run that cannot be restored."""
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
            stage_record.log_points(client, run, metrics)
        case "tags":
            client.log_batch(run, tags=[RunTag(k, v) for k, v in event["tags"].items()])
        case "inputs":
            datasets = []
            for one in event["datasets"]:
                about = {key: value for key, value in one.items() if key != "context"}
                tag = InputTag("mlflow.data.context", one["context"])
                datasets.append(DatasetInput(Dataset(**about), [tag]))
            client.log_inputs(run, datasets=datasets)
        case "models":
            stage_record.apply_event(client, experiment, run, event)
        case "text":
            client.log_text(run, event["text"], event["file"])
        case "file":
            client.log_artifact(run, event["path"])
        case "series":
            journal.cursor.steps.setdefault(event["run"], {}).setdefault(event["file"], -1)
        case "end":
            client.set_terminated(run, event["status"], event["time"])
            journal.cursor.steps.pop(event["run"], None)


def _begin_run(client: MlflowClient, experiment: str, journal: Journal, event: Event) -> None:
    """Find or make the run of an event's key, and set it to RUNNING."""
    key, tags = event["run"], dict(event["tags"])
    mark = f"{journal.about['key']}/{key}"
    run_id = journal.cursor.runs.get(key)
    if run_id is None:
        # A process killed between making the run and noting its id left it in the store.
        found = client.search_runs([experiment], f"tags.`{PREFIX}key` = '{mark}'")
        run_id = found[0].info.run_id if found else None
    if run_id is not None:
        client.update_run(run_id, status=RUNNING)
    else:
        if event["parent"] is not None:
            tags["mlflow.parentRunId"] = journal.cursor.runs[event["parent"]]
        if tags.get(f"{PREFIX}reused") == "true":
            digest = tags[f"{PREFIX}digest"]
            same = f"tags.`{PREFIX}digest` = '{digest}' and tags.`{PREFIX}reused` = 'false'"
            for maker in client.search_runs([experiment], same, max_results=1):
                tags[f"{PREFIX}made_by_run"] = maker.info.run_id
        tags[f"{PREFIX}key"] = mark
        made = client.create_run(experiment, event["time"], tags, run_name=event["name"])
        run_id = made.info.run_id
    journal.cursor.runs[key] = run_id


class MetricsSeries:
    """A file of metrics that grows, and how far this process read it. The store gets of each part
    of a run every metric's first point, and its first that is 0 where that is not or the reverse (a
    spike, a save), and all of a training's last step. A training has `PARTS` equal parts; others,
    whose end nobody knows, have 16 of a step each, and each time that they double eight more."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = self._inode = self._last_step = 0
        self._parts: dict[tuple[str, bool], int] = {}
        """Metric, and whether it is 0 -> first step of the newest part that has a point of it."""

    def iterate_points(self, shipped: int) -> Iterator[tuple[list[Metric], int]]:
        """The points to send of every new whole line behind step `shipped`, with its step. They
        count as read when the next ones are asked for. The shorter file that a resumed trainer puts
        in its place is read from its start."""
        if not self._path.exists():
            return
        with self._path.open("rb") as stream:
            status = os.fstat(stream.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._offset, self._inode, self._parts = 0, status.st_ino, {}
                job = self._path.with_name(JOB_FILE)
                about = json.loads(job.read_text())["train"] if job.is_file() else {}
                self._last_step = -(-about.get("samples_seen", 0) // about.get("global_batch", 1))
            stream.seek(self._offset)
            for line in stream:
                if not line.endswith(b"\n"):
                    return
                step, figures = _parse_line(line)
                size = -(-self._last_step // PARTS) or 1 << (step // 16).bit_length()
                part, is_last = step - step % size, step == self._last_step
                seen = {(one.key, one.value == 0): one for one in figures}
                new = {at: seen[at] for at in seen if is_last or self._parts.get(at) != part}
                if step > shipped and new:
                    yield list(new.values()), step
                self._parts |= dict.fromkeys(new, part)
                self._offset += len(line)


def _parse_line(line: bytes) -> tuple[int, list[Metric]]:
    """Step and points of a line of metrics; -1 and none of a line that is something else."""
    from mlflow.entities import Metric

    try:
        row = json.loads(line)
        step, stamp = int(row["step"]), int(1000 * row["time"])
    except (ValueError, KeyError, TypeError):
        return -1, []
    figures = stage_record.series_metrics(row).items()
    return step, [Metric(name, value, stamp, step) for name, value in figures]
