"""Metrics files, whose new lines become points of a run's curves.

Covers: which files are followed, what is new in one, sending it in batches behind a cursor.
Not here: when (shipper.py); what writes such files.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.lineage import stage_record
from tasks.lineage.journal import Journal, SeriesCursor, now_ms
from tasks.tracking import is_answer

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

MAX_METRICS_PER_CALL = 1000
_log = logging.getLogger(__name__)


def open_series(journal: Journal) -> dict[str, list[Path]]:
    """Series that shipped events opened and no shipped event closed."""
    found: dict[str, list[Path]] = {}
    for offset, event in journal.events():
        if offset > journal.cursor.offset:
            break
        if event["op"] == "series":
            found.setdefault(event["run"], []).append(Path(event["file"]))
        elif event["op"] == "end":
            found.pop(event["run"], None)
    return found


def ship_series(
    client: MlflowClient, journal: Journal, key: str, file: Path, give_up: Callable[[], bool]
) -> bool:
    """Send the new lines of one metrics file; False when `give_up()` ended it early.

    A batch that is sent twice, because its answer was lost, changes nothing: the database knows a
    point by all it says, its time included.
    """
    run, name = journal.cursor.runs.get(key), f"{key}|{file}"
    if run is None:
        return True
    for points, reached in batches(file, journal.cursor.series.get(name, SeriesCursor())):
        if points:
            try:
                client.log_batch(run, metrics=points)
            except Exception as error:
                if not is_answer(client, error):
                    raise
                _log.warning("tracking store refused metrics: %s", str(error)[:300])
        if journal.cursor.series.get(name) != reached:
            journal.cursor.series[name] = reached
            journal.save_cursor()
        if give_up():
            return False
    return True


def batches(file: Path, at: SeriesCursor) -> Iterator[tuple[list[Metric], SeriesCursor]]:
    """New lines as points, as many as one request may hold, each time with the cursor behind."""
    from mlflow.entities import Metric

    points: list[Metric] = []
    reached = at
    for here, line in _new_lines(file, at):
        step, shipped = line.get("step"), reached.step
        more: list[Metric] = []
        if isinstance(step, int) and step > shipped:
            shipped, stamp = step, _milliseconds(line.get("time"))
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
                    yield SeriesCursor(offset, at.step, inode), parsed


def _milliseconds(value: object) -> int:
    """A line's time (UNIX seconds or ISO 8601) in milliseconds; now when it has none."""
    if isinstance(value, int | float):
        return int(value * 1000)
    if isinstance(value, str):
        with suppress(ValueError):
            return int(datetime.fromisoformat(value).timestamp() * 1000)
    return now_ms()
