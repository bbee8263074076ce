"""Runs as OpenLineage events in a file, a JSON line each, for catalogues that read them.

A dataset is all artifacts of a kind under one root, and a digest is its version. A stage that was
there before has no events: those of the run that made it stand in the file.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from openlineage.client import event_v2, facet_v2
from openlineage.client.serde import Serde
from openlineage.client.transport.file import FileConfig, FileTransport

from tasks.artifacts.artifact import Address, Artifact
from tasks.redact import redact_settings

PRODUCER = "urn:evaclip"
NAMESPACE = "evaclip"
"""Of the jobs."""
_ROWS = ("samples", "rows", "selected")
"""Totals that count rows, the first that an artifact has."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobRun:
    """One run of one job: what its events share."""

    run: uuid.UUID
    name: str
    kind: str
    """`FLOW` or `STAGE`."""
    parent: JobRun | None = None

    def stage(self, key: str, title: str) -> JobRun:
        return JobRun(uuid.uuid5(self.run, key), f"{self.name}.{title}", "STAGE", self)


def write_event(
    path: Path,
    kind: str,
    job: JobRun,
    address: Address | None = None,
    made: Artifact | None = None,
    error: str = "",
) -> None:
    """Append one event of a run to the file: OpenLineage's START, RUNNING (it goes on after its
    process was killed), COMPLETE, FAIL or ABORT. The inputs are the parents of a stage's `address`.
    Nothing is raised."""
    event: Any = redact_settings(Serde.to_dict(_make_event(kind, job, address, made, error)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        FileTransport(FileConfig(str(path), append=True)).emit(event)
    except (OSError, RuntimeError) as problem:
        _log.warning("OpenLineage lost an event: %s", problem)


def _make_event(
    kind: str, job: JobRun, address: Address | None, made: Artifact | None, error: str
) -> event_v2.RunEvent:
    facets: dict[str, facet_v2.RunFacet] = {}
    if job.parent is not None:
        above = facet_v2.parent_run.Job(NAMESPACE, job.parent.name)
        run = facet_v2.parent_run.Run(str(job.parent.run))
        facets["parent"] = facet_v2.parent_run.ParentRunFacet(run, above, producer=PRODUCER)
    if error:
        message = facet_v2.error_message_run.ErrorMessageRunFacet
        facets["errorMessage"] = message(error, "python", producer=PRODUCER)
    job_type = facet_v2.job_type_job.JobTypeJobFacet
    about: dict[str, facet_v2.JobFacet] = {}
    about["jobType"] = job_type("BATCH", "EVACLIP", job.kind, producer=PRODUCER)
    return event_v2.RunEvent(
        eventTime=datetime.now(UTC).isoformat(timespec="milliseconds"),
        eventType=event_v2.RunState(kind),
        run=event_v2.Run(str(job.run), facets),
        job=event_v2.Job(NAMESPACE, job.name, about),
        inputs=[] if address is None else list(_input_datasets(address)),
        outputs=[] if made is None else [_output_dataset(made)],
        producer=PRODUCER,
    )


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
