"""Runs as OpenLineage events in a file, for catalogues that read them.

Covers: the events of pipeline and stage runs, after OpenLineage 2-0-2, a JSON line each.
Not here: when a run begins and ends (mlflow_store.py); sending anything to a server.

A dataset is all artifacts of a kind under one root, and a digest is its version. A stage that was
there before has no events: those of the run that made it stand in the file.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tasks.artifacts.artifact import Address, Artifact
from tasks.redact import redacted

SPEC = "https://openlineage.io/spec"
SCHEMA = f"{SPEC}/2-0-2/OpenLineage.json#/$defs/RunEvent"
PRODUCER = "urn:evaclip"
NAMESPACE = "evaclip"
"""Of the jobs."""
EVENT_OF_STATUS = {"FINISHED": "COMPLETE", "FAILED": "FAIL", "KILLED": "ABORT"}
_FACETS = {
    "parent": ("ParentRunFacet", "1-2-0"),
    "errorMessage": ("ErrorMessageRunFacet", "1-0-1"),
    "jobType": ("JobTypeJobFacet", "2-0-4"),
    "version": ("DatasetVersionDatasetFacet", "1-0-1"),
    "outputStatistics": ("OutputStatisticsOutputDatasetFacet", "1-0-2"),
}
_ROWS = ("samples", "rows", "selected")
"""Totals that count rows, the first that an artifact has."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One run of one job: what its events share."""

    run: uuid.UUID
    name: str
    kind: str
    """`FLOW` or `STAGE`."""
    parent: Job | None = None

    @classmethod
    def of_pipeline(cls, key: str, name: str) -> Job:
        """The run of a pipeline; `key` is its journal's."""
        return cls(uuid.UUID(key), name, "FLOW")

    def stage(self, key: str, title: str) -> Job:
        """The run of one of its stages."""
        return Job(uuid.uuid5(self.run, key), f"{self.name}.{title}", "STAGE", self)


class EventFile:
    """Appends events; nothing is written without a path, and nothing is raised."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def append(self, event: Mapping[str, Any]) -> None:
        """Add one event as a line, whole even when several processes write."""
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps(redacted(event), separators=(",", ":")) + "\n"
            with self._path.open("ab", buffering=0) as file:
                file.write(line.encode())
        except OSError as error:
            _log.warning("OpenLineage lost an event: %s", error)


def started(job: Job, address: Address | None, continued: bool) -> dict[str, Any]:
    """A run begins, or goes on after its process was killed."""
    inputs = [] if address is None else list(_inputs(address))
    return _event("RUNNING" if continued else "START", job, inputs, [], {})


def ended(
    job: Job, status: str, address: Address | None, artifact: Artifact | None, error: str
) -> dict[str, Any]:
    """A run ends with one of MLflow's statuses."""
    facets: dict[str, Any] = {}
    if error:
        facets["errorMessage"] = _facet(
            "errorMessage", {"message": error, "programmingLanguage": "python"}
        )
    inputs = [] if address is None else list(_inputs(address))
    outputs = [] if artifact is None else [_output(artifact)]
    return _event(EVENT_OF_STATUS[status], job, inputs, outputs, facets)


def _event(
    kind: str,
    job: Job,
    inputs: list[dict[str, Any]],
    outputs: list[dict[str, Any]],
    facets: dict[str, Any],
) -> dict[str, Any]:
    if job.parent is not None:
        above = {
            "run": {"runId": str(job.parent.run)},
            "job": {"namespace": NAMESPACE, "name": job.parent.name},
        }
        facets = {"parent": _facet("parent", above), **facets}
    job_type = {"processingType": "BATCH", "integration": "EVACLIP", "jobType": job.kind}
    return {
        "eventType": kind,
        "eventTime": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "run": {"runId": str(job.run), "facets": facets},
        "job": {
            "namespace": NAMESPACE,
            "name": job.name,
            "facets": {"jobType": _facet("jobType", job_type)},
        },
        "inputs": inputs,
        "outputs": outputs,
        "producer": PRODUCER,
        "schemaURL": SCHEMA,
    }


def _facet(key: str, content: Mapping[str, Any]) -> dict[str, Any]:
    name, version = _FACETS[key]
    schema = f"{SPEC}/facets/{version}/{name}.json#/$defs/{name}"
    return {"_producer": PRODUCER, "_schemaURL": schema, **content}


def _inputs(address: Address) -> Iterator[dict[str, Any]]:
    for role, digest in address.parents.items():
        folder = next(address.root.glob(f"*/{digest}"), None)
        name = f"outside/{address.stage.name}.{role}" if folder is None else folder.parent.name
        yield _dataset(address.root, name, digest)


def _output(artifact: Artifact) -> dict[str, Any]:
    counts, files = artifact.counts, artifact.files
    rows = next((int(counts[name]) for name in _ROWS if name in counts), None)
    statistics: dict[str, int] = {"fileCount": len(files)}
    statistics["size"] = sum(int(file["size"]) for file in files.values())
    if rows is not None:
        statistics["rowCount"] = rows
    made = _dataset(artifact.folder.parent.parent, artifact.kind, artifact.digest)
    facets = {"outputStatistics": _facet("outputStatistics", statistics)}
    return {**made, "outputFacets": facets}


def _dataset(root: Path, name: str, digest: str) -> dict[str, Any]:
    version = _facet("version", {"datasetVersion": digest})
    namespace = Path(os.path.abspath(root)).as_uri()
    return {"namespace": namespace, "name": name, "facets": {"version": version}}
