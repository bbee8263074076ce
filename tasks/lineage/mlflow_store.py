"""A run tree in MLflow that is complete even when the tracking server was away.

Covers: opening and closing pipeline and stage runs, following a trainer's metrics, sampling the
machine's use; all of it into a journal on disk. Works with or without Prefect.

A pipeline run that was killed is continued by the next one of the same recipe digest; a stage
entered twice is one run. Nothing here raises because of the store: events wait in the journal and a
later run ships them. Not here: the way from the journal to MLflow (shipper.py), what is logged of
an artifact (stage_record.py), the journal's files (journal.py).

The same runs as OpenLineage events, a JSON line each, go into a file for catalogues that read them,
if one is named. A dataset there is all artifacts of a kind under one root, and a digest is its
version. A stage that was there before has no events: those of the run that made it are in the file.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from openlineage.client import event_v2, facet_v2
from openlineage.client.serde import Serde
from openlineage.client.transport.file import FileConfig, FileTransport

from tasks.artifacts.artifact import Address, Artifact
from tasks.lineage import stage_record
from tasks.lineage.journal import PIPELINE, Event, Journal
from tasks.lineage.shipper import Shipper
from tasks.redact import redact_settings
from tasks.tracking import TrackingStore, import_mlflow

_log = logging.getLogger(__name__)
PRODUCER = "urn:evaclip"
NAMESPACE = "evaclip"
"""Of the jobs."""
_ROWS = ("samples", "rows", "selected")
"""Totals that count rows, the first that an artifact has."""


@dataclass(frozen=True)
class Tracking:
    """Opens pipeline runs in one tracking store; contacts nothing before."""

    store: TrackingStore
    journals: Path
    """Their folder, one sub-folder a pipeline run."""
    patience_s: float = 20.0
    """Longest wait for the store when a pipeline run closes."""
    system_every_s: float = 5.0
    """Time between two samples of system metrics."""
    openlineage: Path | None = None
    """File that gets the runs as OpenLineage events, too."""

    @contextmanager
    def pipeline_run(
        self,
        name: str,
        digest: str,
        *,
        recipe: str = "",
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Iterator[PipelineRun]:
        """The parent run of one execution of a flow; goes on with one of the same digest whose
        process was killed. Found by its local journal, not in the store: a run that looks open
        there may be another machine's, at work.

        Args:
            digest: of the resolved recipe, whose text `recipe` is kept as an artifact.
            params: flat or nested settings to log.
            tags: more tags, such as `prefect.flow_run_id`, or MLflow's for the run's description.
        """
        import_mlflow()
        journal = self._claim_unfinished(digest)
        if journal is None:
            about = {"digest": digest, "uri": self.store.uri, "experiment": self.store.experiment}
            journal = Journal.create_journal(self.journals, about)
        shipper = Shipper(self.store, self.journals, journal)
        run = PipelineRun(self, shipper, PIPELINE, name)
        own = {f"{stage_record.PREFIX}recipe_digest": digest, "mlflow.source.name": name}
        try:
            with run.opened(name, None, {**own, **(tags or {})}, params or {}):
                if recipe:
                    run.append({"op": "text", "file": "recipe.json", "text": recipe})
                shipper.start()
                yield run
        finally:
            shipper.ship_rest(self.patience_s)

    def close_killed(self) -> None:
        """Set runs whose process was killed to KILLED; they are still continued by the next of
        their recipe, and what is at work, in whatever process, is left alone."""
        import_mlflow()
        for left in Journal.claim_unshipped(self.journals):
            Shipper(self.store, self.journals, left).ship_left(left, give_up=lambda: False)

    def has_unfinished(self, digest: str) -> bool:
        """Tell whether a pipeline run of this recipe was killed and waits to be continued."""
        found = self._claim_unfinished(digest)
        if found is not None:
            found.release()
        return found is not None

    def _claim_unfinished(self, digest: str) -> Journal | None:
        """The journal of a killed run, whatever address the store had then: in another one, which
        does not know the run, it is made anew."""
        wanted = {"digest": digest, "experiment": self.store.experiment}.items()
        for left in Journal.claim_unshipped(self.journals):
            if wanted <= left.about.items() and not left.is_closed:
                return left
            left.release()
        return None


@dataclass(eq=False)
class TrackedRun:
    """The common part of pipeline and stage runs: events that name their run, and its page."""

    _tracking: Tracking
    _shipper: Shipper
    key: str
    """In the journal."""
    _job: str
    """Its name among OpenLineage's."""
    _address: Address | None = None
    _parent: TrackedRun | None = None
    _made: Artifact | None = None

    def __post_init__(self) -> None:
        journal, parent, address = self._shipper.journal, self._parent, self._address
        root = uuid.UUID(journal.about["key"])
        self._uuid: uuid.UUID = uuid.uuid5(parent._uuid, self.key) if parent else root
        status = journal.run_statuses().get(self.key)
        self.is_continued = status is not None
        self.is_over = status == "FINISHED"
        self.is_reused = address is not None and address.is_finished and not self.is_continued

    def append(self, event: Event) -> None:
        """Journal an event of this run, unless it finished in the process that was killed. A full
        disk is a warning here; the stages report it."""
        if self.is_over:
            return
        try:
            self._shipper.journal.append_event(redact_settings({**event, "run": self.key}))
        except OSError as error:
            _log.warning("lineage lost an event (%s): %s", event["op"], error)
        self._shipper.wake()

    def run_id(self, wait_s: float = 5.0) -> str | None:
        """MLflow's id of this run, or None when the store did not answer within `wait_s`."""
        return self._shipper.run_id(self.key, wait_s)

    def url(self) -> str | None:
        """The run's page; None for a store without pages or one that does not answer."""
        store = self._tracking.store
        run_id = self.run_id() if store.database is None else None
        experiment = self._shipper.experiment
        return run_id and experiment and f"{store.uri}/#/experiments/{experiment}/runs/{run_id}"

    @contextmanager
    def opened(
        self, name: str, parent: str | None, tags: Mapping[str, str], params: Mapping[str, Any]
    ) -> Iterator[None]:
        """Open the run under that of the key `parent`, or go on with it (then its tags and its
        parameters, nested or flat, are there), and end it as MLflow's FINISHED, FAILED (an error)
        or KILLED (an interruption)."""
        kept = {} if self.is_continued else dict(tags)
        self.append({"op": "begin", "name": name, "parent": parent, "tags": kept})
        if params and not self.is_continued:
            self.append({"op": "params", "params": stage_record.flatten_config(params)})
        self._write_event("RUNNING" if self.is_continued else "START")
        try:
            yield
        except BaseException as error:
            reason = str(error) or type(error).__name__
            self.append({"op": "tags", "tags": {f"{stage_record.PREFIX}error": reason[:500]}})
            is_failed = isinstance(error, Exception)
            self.append({"op": "end", "status": "FAILED" if is_failed else "KILLED"})
            self._write_event("FAIL" if is_failed else "ABORT", reason)
            raise
        self.append({"op": "end", "status": "FINISHED"})
        self._write_event("COMPLETE")

    def _write_event(self, kind: str, reason: str = "") -> None:
        """Append an event of OpenLineage: START, RUNNING (it goes on after its process was killed),
        COMPLETE, FAIL or ABORT. The inputs are the parents of a stage. Nothing is raised."""
        path = self._tracking.openlineage
        if path is None or self.is_reused or self.is_over:
            return
        facets: dict[str, facet_v2.RunFacet] = {}
        level = "FLOW" if self._parent is None else "STAGE"
        if self._parent is not None:
            above = facet_v2.parent_run.Job(NAMESPACE, self._parent._job)
            run = facet_v2.parent_run.Run(str(self._parent._uuid))
            facets["parent"] = facet_v2.parent_run.ParentRunFacet(run, above, producer=PRODUCER)
        if reason:
            message = facet_v2.error_message_run.ErrorMessageRunFacet
            facets["errorMessage"] = message(reason, "python", producer=PRODUCER)
        job_facet = facet_v2.job_type_job.JobTypeJobFacet
        job_type = job_facet("BATCH", "EVACLIP", level, producer=PRODUCER)
        made = event_v2.RunEvent(
            eventTime=datetime.now(UTC).isoformat(timespec="milliseconds"),
            eventType=event_v2.RunState(kind),
            run=event_v2.Run(str(self._uuid), facets),
            job=event_v2.Job(NAMESPACE, self._job, {"jobType": job_type}),
            inputs=list(_input_datasets(self._address)) if self._address else [],
            outputs=[_output_dataset(self._made)] if self._made else [],
            producer=PRODUCER,
        )
        event: Any = redact_settings(Serde.to_dict(made))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            FileTransport(FileConfig(str(path), append=True)).emit(event)
        except (OSError, RuntimeError) as problem:
            _log.warning("OpenLineage lost an event: %s", problem)


class PipelineRun(TrackedRun):
    @contextmanager
    def stage_run(self, address: Address, title: str | None = None) -> Iterator[StageRun]:
        """The run of one stage, under this one; entered again, it is the same run. When `address`
        is finished on entry, it is tagged as reused and linked to the run that made it; `title` is
        what people see, the stage's name where that appears once in the flow."""
        title = title or address.stage.name
        run = self._make_stage_run(address, title)
        tags = stage_record.stage_tags(address, run.is_reused)
        with run.opened(title, self.key, tags, address.config):
            yield run

    def stage_url(self, address: Address, title: str | None = None) -> str | None:
        """The page of a stage's run under this one, where `url` would have one."""
        return self._make_stage_run(address, title or address.stage.name).url()

    def _make_stage_run(self, address: Address, title: str) -> StageRun:
        key = f"{title}-{address.digest}"
        job = f"{self._job}.{title}"
        return StageRun(self._tracking, self._shipper, key, job, address, self)


class StageRun(TrackedRun):
    def record_artifact(
        self,
        artifact: Artifact,
        *,
        inputs: Mapping[str, Artifact] | None = None,
        outside: Sequence[Mapping[str, str]] = (),
        attach: Sequence[Path] = (),
    ) -> None:
        """Record what the stage made: counts become metrics, a model a logged model, linked to the
        run that made it and to those that read it.

        Args:
            inputs: context (training, evaluation, …) -> the data it read, logged as datasets.
            outside: data it read that no stage made, as `stage_record.outside_dataset` says it.
            attach: files kept with the run, such as a report.
        """
        self._made = artifact
        self.append({"op": "metrics", "metrics": stage_record.count_metrics(artifact)})
        read = [stage_record.describe_dataset(data, to) for to, data in (inputs or {}).items()]
        if datasets := [*read, *outside]:
            self.append({"op": "inputs", "datasets": datasets})
        if of_models := stage_record.model_event(artifact, self.is_reused):
            self.append(of_models)
        for file in attach:  # copied when it is shipped
            self.append({"op": "file", "path": str(file.resolve())})

    @contextmanager
    def follow_metrics(self, metrics_file: Path) -> Iterator[None]:
        """Ship the lines of `metrics_file` (JSON with `step` and `time`), thinned, while work goes
        on, and samples of the machine's use. The file may not exist yet and may be cut back on
        resume. A reused stage sends nothing: the run that made it did."""
        if self.is_reused or self.is_over:
            yield
            return
        system = self._shipper.journal.folder / f"system-{stage_record.metric_name(self.key)}.jsonl"
        for file in (metrics_file, system):
            self.append({"op": "series", "file": str(file.resolve())})
        with _sample_system(system, self._tracking.system_every_s):
            yield


@contextmanager
def _sample_system(file: Path, every_s: float) -> Iterator[None]:
    """Write the machine's use (CPU, memory, disk, network, GPU) into `file`, as one more series."""
    stopped = threading.Event()
    thread = threading.Thread(
        target=_write_samples, args=(file, every_s, stopped), name="system-metrics", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join(every_s)


def _write_samples(file: Path, every_s: float, stopped: threading.Event) -> None:
    # MLflow's own SystemMetricsMonitor ends when it cannot send, and opens the store in a thread.
    try:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with suppress(Exception):  # no NVIDIA GPU, or no library to ask it
            monitors.append(GPUMonitor())
        step = file.read_bytes().count(b"\n") if file.exists() else 0
        _sample_use(monitors)  # the first CPU figure covers no time, so it means nothing
        while not stopped.wait(every_s):
            line = {"step": step, "time": time.time(), **_sample_use(monitors)}
            with file.open("a") as samples:
                samples.write(json.dumps(line) + "\n")
            step += 1
    except Exception as error:  # figures about the machine are never worth a run
        _log.warning("system metrics stopped: %s", error)


def _sample_use(monitors: Sequence[Any]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for monitor in monitors:
        monitor.collect_metrics()
        figures |= {f"system/{name}": v for name, v in monitor.aggregate_metrics().items()}
        monitor.clear_metrics()
    return figures


def _input_datasets(address: Address) -> Iterator[event_v2.InputDataset]:
    for role, digest in address.parents.items():
        folder = next(address.root.glob(f"*/{digest}"), None)
        name = f"outside/{address.stage.name}.{role}" if folder is None else folder.parent.name
        yield event_v2.InputDataset(address.root.absolute().as_uri(), name, facets=_version(digest))


def _output_dataset(made: Artifact) -> event_v2.OutputDataset:
    statistics = facet_v2.output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(
        rowCount=next((int(made.counts[name]) for name in _ROWS if name in made.counts), None),
        size=sum(int(file["size"]) for file in made.files.values()),
        fileCount=len(made.files),
        producer=PRODUCER,
    )
    return event_v2.OutputDataset(
        made.folder.parent.parent.absolute().as_uri(),
        made.kind,
        {"outputStatistics": statistics},
        facets=_version(made.digest),
    )


def _version(digest: str) -> dict[str, facet_v2.DatasetFacet]:
    facet = facet_v2.dataset_version_dataset.DatasetVersionDatasetFacet
    return {"version": facet(digest, producer=PRODUCER)}
