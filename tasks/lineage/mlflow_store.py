"""A run tree in MLflow that no outage of the tracking server can stop or thin out.

Covers: opening and closing pipeline and stage runs, following a trainer's metrics, system metrics,
shipping all of it to MLflow from a journal on disk. Works with or without Prefect:

    tracking = Tracking(TrackingStore.at("sqlite:///runs/mlflow.db", "evaclip"), root / "tracking")
    with tracking.pipeline_run("demo", recipe_digest, recipe=json_text, links={...}) as pipeline:
        with pipeline.stage_run(address, title="train-1") as stage:
            with stage.follow(address.folder / "metrics.jsonl"):
                artifact = ...
            stage.done(artifact, inputs={"training": shards}, attach=[artifact.folder / "a.html"])

A pipeline run that was killed is continued by the next one of the same recipe digest; a stage
entered twice is one run; a stage whose artifact was there before is tagged `evaclip.reused`.
Nothing here raises because of the store: events wait in the journal and a later run ships them.

Not here: what is logged of an artifact (record.py), logged models (models.py), the events of
OpenLineage (openlineage.py), the journal's files (journal.py), the model registry (tasks/register).
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.artifact import Address, Artifact
from tasks.lineage import models, openlineage, record
from tasks.lineage.journal import PIPELINE, RUNNING, Event, Journal, SeriesCursor
from tasks.lineage.openlineage import EventFile, Job
from tasks.redact import redacted
from tasks.tracking import TrackingStore, import_mlflow, is_refusal

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

MAX_METRICS_PER_CALL = 1000
POLL_S = 1.0
LONGEST_BACKOFF_S = 30.0
LEFTOVERS_S = 10.0
"""How long what earlier runs left may keep back the events of a run that is at work."""
RECIPE_FILE = "recipe.json"
_log = logging.getLogger(__name__)


class Tracking:
    """Opens pipeline runs in one tracking store."""

    def __init__(
        self,
        store: TrackingStore,
        journals: Path,
        *,
        patience_s: float = 20.0,
        system_every_s: float = 5.0,
        openlineage: Path | None = None,
    ) -> None:
        """Nothing is contacted yet.

        Args:
            store: where runs go in the end.
            journals: folder of the journals, one sub-folder a pipeline run.
            patience_s: longest wait for the store when a pipeline run closes, in seconds.
            system_every_s: time between two samples of system metrics, in seconds.
            openlineage: file that gets the runs as OpenLineage events, too.
        """
        self.store = store
        self.journals = journals
        self.patience_s = patience_s
        self.system_every_s = system_every_s
        self.events = EventFile(openlineage)

    @contextmanager
    def pipeline_run(
        self,
        name: str,
        digest: str,
        *,
        recipe: str = "",
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        links: Mapping[str, str] | None = None,
    ) -> Iterator[PipelineRun]:
        """The parent run of one execution of a flow.

        Continues a run of the same digest whose process was killed. Found by its local journal,
        not in the store: a run that looks open there may be another machine's, at work.

        Args:
            name: what people see.
            digest: of the resolved recipe; decides what may be continued.
            recipe: the resolved recipe's text, kept as the artifact `recipe.json`.
            params: flat or nested settings to log.
            tags: more tags, such as `prefect.flow_run_id` or the git commit.
            links: name -> URL, shown in the run's description.
        """
        import_mlflow()
        journal = self._journal(digest)
        shipper = _Shipper(self, journal)
        run = PipelineRun(self, journal, shipper, name)
        described = {"mlflow.note.content": record.note("", links)} if links else {}
        own = {f"{record.PREFIX}recipe_digest": digest, "mlflow.source.name": name}
        run.begin(name, parent=None, tags={**own, **described, **(tags or {})})
        run.log_params(params or {})
        self.events.append(openlineage.started(run.job, None, run.is_continued))
        if recipe:
            run.append({"op": "text", "file": RECIPE_FILE, "text": recipe})
        shipper.start()
        try:
            with run.closing():
                yield run
        finally:
            shipper.finish(self.patience_s)

    def close_killed(self) -> None:
        """Show in the store what died and could not say so, where the next run has not done it.

        A run that is at work, in whatever process, is left alone; one that was killed is still
        continued by the next of its recipe.
        """
        import_mlflow()
        for left in Journal.unshipped(self.journals):
            _Shipper(self, left).ship_left(left, give_up=lambda: False)

    def has_unfinished(self, digest: str) -> bool:
        """Whether a pipeline run of this recipe was killed and waits to be continued."""
        about = self._about(digest)
        found = False
        for left in Journal.unshipped(self.journals):
            found = found or (_is_of(left, about) and not left.is_closed)
            left.release()
        return found

    def _about(self, digest: str) -> dict[str, str]:
        return {"digest": digest, "uri": self.store.uri, "experiment": self.store.experiment}

    def _journal(self, digest: str) -> Journal:
        about = self._about(digest)
        for left in Journal.unshipped(self.journals):
            if _is_of(left, about) and not left.is_closed:
                return left
            left.release()
        return Journal.start(self.journals, about)


def _is_of(journal: Journal, about: Mapping[str, str]) -> bool:
    return all(journal.about.get(name) == value for name, value in about.items())


class _Run:
    """What pipeline and stage runs share: events that name their run, and its address."""

    def __init__(
        self, tracking: Tracking, journal: Journal, shipper: _Shipper, key: str, job: Job
    ) -> None:
        self._tracking = tracking
        self._journal = journal
        self._shipper = shipper
        self.key = key
        self.job = job
        status = journal.runs().get(key)
        self.is_continued = status is not None
        self.is_over = status == "FINISHED"

    def append(self, event: Event) -> None:
        """Journal an event of this run, unless it finished in the process that was killed.

        A full disk is a warning here; the stages report it.
        """
        if self.is_over:
            return
        try:
            self._journal.append(redacted({**event, "run": self.key}))
        except OSError as error:
            _log.warning("lineage lost an event (%s): %s", event["op"], error)
        self._shipper.wake()

    def begin(self, name: str, parent: str | None, tags: Mapping[str, str]) -> None:
        kept = {} if self.is_continued else dict(tags)
        self.append({"op": "begin", "name": name, "parent": parent, "tags": kept, "time": _now()})

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log settings, flattened; a parameter that is there keeps its first value."""
        if params and not self.is_continued:
            self.append({"op": "params", "params": record.flatten(params)})

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        self.append({"op": "metrics", "metrics": dict(metrics), "time": _now()})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self.append({"op": "tags", "tags": dict(tags)})

    def attach(self, file: Path, folder: str | None = None) -> None:
        """Keep a file as an artifact of the run; it is copied when it is shipped."""
        self.append({"op": "file", "path": str(file.resolve()), "folder": folder})

    def run_id(self, wait_s: float = 5.0) -> str | None:
        """MLflow's id of this run, or None when the store did not answer within `wait_s`."""
        return self._shipper.run_id(self.key, wait_s)

    def url(self, wait_s: float = 5.0) -> str | None:
        """The run's page; None for a store without pages or one that does not answer."""
        if self._tracking.store.database is not None:
            return None
        run_id = self.run_id(wait_s)
        experiment = self._shipper.experiment
        if run_id is None or experiment is None:
            return None
        return f"{self._tracking.store.uri}/#/experiments/{experiment}/runs/{run_id}"

    @contextmanager
    def closing(self) -> Iterator[None]:
        """End the run as MLflow's FINISHED, FAILED (an error) or KILLED (an interruption)."""
        try:
            yield
        except BaseException as error:
            status = "FAILED" if isinstance(error, Exception) else "KILLED"
            reason = str(error) or type(error).__name__
            self.set_tags({f"{record.PREFIX}error": reason[:500]})
            self._end(status, reason)
            raise
        self._end("FINISHED", "")

    def _end(self, status: str, reason: str) -> None:
        self.append({"op": "end", "status": status, "time": _now()})
        if not self.is_over:
            self._tell_end(status, reason)

    def _tell_end(self, status: str, reason: str) -> None:
        self._tracking.events.append(openlineage.ended(self.job, status, None, None, reason))


class PipelineRun(_Run):
    """The parent run of one execution of a flow."""

    def __init__(self, tracking: Tracking, journal: Journal, shipper: _Shipper, name: str) -> None:
        job = Job.of_pipeline(journal.about["key"], name)
        super().__init__(tracking, journal, shipper, PIPELINE, job)

    @contextmanager
    def stage_run(self, address: Address, title: str | None = None) -> Iterator[StageRun]:
        """The run of one stage, under this one; entered again, it is the same run.

        Args:
            address: of the stage's artifact. When it is finished on entry, the stage is tagged as
                reused and linked to the run that made it.
            title: what people see; the stage's name when it appears once in the flow.
        """
        title = title or address.stage.name
        run = self._stage(address, title)
        run.begin(title, parent=self.key, tags=record.stage_tags(address, run.is_reused))
        run.log_params(address.config)
        run.tell_start()
        with run.closing():
            yield run

    def stage_url(self, address: Address, title: str | None = None) -> str | None:
        """The page of a stage's run under this one, where `url` would have one."""
        return self._stage(address, title or address.stage.name).url()

    def _stage(self, address: Address, title: str) -> StageRun:
        key = f"{title}-{address.digest}"
        job = self.job.stage(key, title)
        return StageRun(self._tracking, self._journal, self._shipper, key, job, address)


class StageRun(_Run):
    """The run of one stage."""

    def __init__(
        self,
        tracking: Tracking,
        journal: Journal,
        shipper: _Shipper,
        key: str,
        job: Job,
        address: Address,
    ) -> None:
        super().__init__(tracking, journal, shipper, key, job)
        self.is_reused = address.is_finished and not self.is_continued
        self._address = address
        self._made: Artifact | None = None

    def tell_start(self) -> None:
        """Tell OpenLineage, where it is written."""
        if not (self.is_reused or self.is_over):
            event = openlineage.started(self.job, self._address, self.is_continued)
            self._tracking.events.append(event)

    def _tell_end(self, status: str, reason: str) -> None:
        if not self.is_reused:
            event = openlineage.ended(self.job, status, self._address, self._made, reason)
            self._tracking.events.append(event)

    def done(
        self,
        artifact: Artifact,
        *,
        inputs: Mapping[str, Artifact] | None = None,
        outside: Sequence[Mapping[str, str]] = (),
        attach: Sequence[Path] = (),
    ) -> None:
        """Record what the stage made.

        Args:
            artifact: its counts become metrics; a model becomes a logged model, linked to the run
                that made it and to those that read it.
            inputs: context (training, evaluation, …) -> the data it read, logged as datasets.
            outside: data it read that no stage made, as `record.outside_dataset` describes them.
            attach: files kept with the run, such as a report.
        """
        self._made = artifact
        self.log_metrics(record.metrics(artifact))
        datasets = [record.dataset(data, context) for context, data in (inputs or {}).items()]
        datasets += [dict(one) for one in outside]
        if datasets:
            self.append({"op": "inputs", "datasets": datasets})
        of_models = models.event(artifact, self.is_reused)
        if of_models is not None:
            self.append({**of_models, "time": _now()})
        for file in attach:
            self.attach(file)

    @contextmanager
    def follow(self, metrics_file: Path) -> Iterator[None]:
        """Ship every line of `metrics_file` (JSON with `step` and `time`) while work goes on.

        The file may not exist yet and may be cut back on resume; a step is sent once. System
        metrics are sampled meanwhile. A reused stage sends nothing: the run that made it did.
        """
        if self.is_reused or self.is_over:
            yield
            return
        system = self._journal.folder / f"system-{record.metric_name(self.key)}.jsonl"
        for file in (metrics_file, system):
            self.append({"op": "series", "file": str(file.resolve())})
        sampler = _SystemSampler(system, self._tracking.system_every_s)
        sampler.start()
        try:
            yield
        finally:
            sampler.stop()


class _Shipper(threading.Thread):
    """Applies a journal's events to the store, in order, in the background, until told to stop."""

    def __init__(self, tracking: Tracking, journal: Journal) -> None:
        super().__init__(name="lineage", daemon=True)
        self._store = tracking.store
        self._journals = tracking.journals
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
        self._changed.set()

    def run_id(self, key: str, wait_s: float) -> str | None:
        with self._shipped_one:
            self._shipped_one.wait_for(lambda: key in self._journal.cursor.runs, wait_s)
            return self._journal.cursor.runs.get(key)

    def finish(self, patience_s: float) -> None:
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
                    self._ship(self._journal, self._abandoned.is_set)
                    backoff = POLL_S
                    if leftovers or closing:
                        leftovers = self._ship_leftovers(closing)
                    if closing:
                        return
                except Exception as error:  # the store may fail in any way; work must go on
                    self._last_error = error
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

        for left in Journal.unshipped(self._journals):
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
            if self._ship(left, give_up) and not left.is_closed:
                _close_killed(self._connected(), left)
        except Exception as error:
            self._last_error = error
            _log.warning("%s waits for another run: %s", left.folder, str(error)[:200])
        finally:
            left.release()

    def _connected(self) -> MlflowClient:
        if self._client is None:
            self._client = self._store.client()
        return self._client

    def _experiment_id(self, client: MlflowClient, name: str) -> str:
        if name not in self._experiments:
            self._experiments[name] = TrackingStore(self._store.uri, name).experiment_id(client)
        return self._experiments[name]

    def _ship(self, journal: Journal, give_up: Callable[[], bool]) -> bool:
        """Apply the journal's events that wait; False when `give_up()` ended it early."""
        client = self._connected()
        experiment = self._experiment_id(client, journal.about["experiment"])
        series = _open_series(journal)
        for offset, event in journal.events(journal.cursor.offset):
            if give_up():
                return False
            if event["op"] == "series":
                series.setdefault(event["run"], []).append(Path(event["file"]))
            elif event["op"] == "end":
                for file in series.pop(event["run"], []):
                    if not _ship_series(client, journal, event["run"], file, give_up):
                        return False
            try:
                _apply(client, experiment, journal, event)
            except (FileNotFoundError, KeyError) as error:
                _log.warning("tracking event %s skipped: %s", event["op"], error)
            except Exception as error:
                if not _is_answer(client, error):
                    raise
                _log.warning("tracking store refused %s: %s", event["op"], str(error)[:300])
            with self._shipped_one:
                journal.cursor.offset = offset
                journal.save_cursor()
                self._shipped_one.notify_all()
        for key, files in series.items():
            for file in files:
                if not _ship_series(client, journal, key, file, give_up):
                    return False
        if journal.is_closed:
            journal.mark_shipped()
        return True


def _is_answer(client: MlflowClient, error: Exception) -> bool:
    """Whether the store itself said no: what stands before it says 404 while it is away."""
    if not is_refusal(error):
        return False
    client.search_experiments(max_results=1)  # raises when the store is away
    return True


def _open_series(journal: Journal) -> dict[str, list[Path]]:
    """Series that shipped events opened and no shipped event closed."""
    open_series: dict[str, list[Path]] = {}
    for offset, event in journal.events():
        if offset > journal.cursor.offset:
            break
        if event["op"] == "series":
            open_series.setdefault(event["run"], []).append(Path(event["file"]))
        elif event["op"] == "end":
            open_series.pop(event["run"], None)
    return open_series


def _apply(client: MlflowClient, experiment: str, journal: Journal, event: Event) -> None:
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
            models.apply(client, experiment, run, event, event["time"])
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
        found = client.search_runs([experiment], f"tags.`{record.PREFIX}key` = '{mark}'")
        run_id = found[0].info.run_id if found else None
    if run_id is not None:
        client.update_run(run_id, status=RUNNING)
    else:
        if event["parent"] is not None:
            tags["mlflow.parentRunId"] = journal.cursor.runs[event["parent"]]
        if tags.get(f"{record.PREFIX}reused") == "true":
            tags |= _maker(client, experiment, tags[f"{record.PREFIX}digest"])
        tags[f"{record.PREFIX}key"] = mark
        made = client.create_run(experiment, event["time"], tags, run_name=event["name"])
        run_id = made.info.run_id
    journal.cursor.runs[key] = run_id


def _maker(client: MlflowClient, experiment: str, digest: str) -> dict[str, str]:
    """The tag that links a reused stage to the run that made its artifact, if it is known."""
    made = client.search_runs(
        [experiment],
        f"tags.`{record.PREFIX}digest` = '{digest}' and tags.`{record.PREFIX}reused` = 'false'",
        max_results=1,
    )
    return {f"{record.PREFIX}made_by_run": made[0].info.run_id} if made else {}


def _set_tags(client: MlflowClient, run: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run, tags=[RunTag(name, value) for name, value in tags.items()])


def _close_killed(client: MlflowClient, journal: Journal) -> None:
    """Show a killed run as killed; the run that continues it sets it back to RUNNING."""
    for key, status in journal.runs().items():
        if status == RUNNING and key in journal.cursor.runs:
            client.set_terminated(journal.cursor.runs[key], "KILLED")


def _ship_series(
    client: MlflowClient, journal: Journal, key: str, file: Path, give_up: Callable[[], bool]
) -> bool:
    """Send the new lines of one metrics file; False when `give_up()` ended it early.

    A batch that is sent twice, because its answer was lost, changes nothing: the database knows a
    point by all it says, its time included.
    """
    run, name = journal.cursor.runs.get(key), f"{key}|{file}"
    if run is None:
        return True
    for points, reached in _batches(file, journal.cursor.series.get(name, SeriesCursor())):
        if points:
            try:
                client.log_batch(run, metrics=points)
            except Exception as error:
                if not _is_answer(client, error):
                    raise
                _log.warning("tracking store refused metrics: %s", str(error)[:300])
        if journal.cursor.series.get(name) != reached:
            journal.cursor.series[name] = reached
            journal.save_cursor()
        if give_up():
            return False
    return True


def _batches(file: Path, at: SeriesCursor) -> Iterator[tuple[list[Metric], SeriesCursor]]:
    """New lines as points, as many as one request may hold, each time with the cursor behind."""
    from mlflow.entities import Metric

    points: list[Metric] = []
    reached = at
    for here, line in _new_lines(file, at):
        step, shipped = line.get("step"), reached.step
        more: list[Metric] = []
        if isinstance(step, int) and step > shipped:
            shipped, stamp = step, _milliseconds(line.get("time"))
            more = [Metric(k, v, stamp, step) for k, v in record.series_metrics(line).items()]
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
                    yield SeriesCursor(offset, at.step, inode), parsed


def _milliseconds(value: object) -> int:
    """A line's time (UNIX seconds or ISO 8601) in milliseconds; now when it has none."""
    if isinstance(value, int | float):
        return int(value * 1000)
    if isinstance(value, str):
        with suppress(ValueError):
            return int(datetime.fromisoformat(value).timestamp() * 1000)
    return _now()


def _now() -> int:
    return int(time.time() * 1000)


class _SystemSampler(threading.Thread):
    """Writes the machine's use (CPU, memory, disk, network, GPU) as one more series.

    Through the journal instead of MLflow's own monitor thread, which loses what it cannot send.
    """

    def __init__(self, file: Path, every_s: float) -> None:
        super().__init__(name="system-metrics", daemon=True)
        self._file = file
        self._every_s = every_s
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()
        self.join(self._every_s)

    def run(self) -> None:
        try:
            monitors = _monitors()
            step = _lines_in(self._file)
            while not self._stopped.wait(self._every_s):
                with self._file.open("a") as file:
                    file.write(json.dumps({"step": step, "time": time.time(), **_sample(monitors)}))
                    file.write("\n")
                step += 1
        except Exception as error:  # figures about the machine are never worth a run
            _log.warning("system metrics stopped: %s", error)


def _lines_in(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with suppress(Exception):  # no NVIDIA GPU, or no library to ask it
        monitors.append(GPUMonitor())
    _sample(monitors)  # the first CPU figure covers no time, so it means nothing
    return monitors


def _sample(monitors: Sequence[Any]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for monitor in monitors:
        monitor.collect_metrics()
        figures |= {f"system/{name}": v for name, v in monitor.aggregate_metrics().items()}
        monitor.clear_metrics()
    return figures
