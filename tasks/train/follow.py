"""The progress of a training run, read from the files it writes.

Covers: the newest lines of `metrics.jsonl`, and one line of text about them.
Not here: tracking (tasks/lineage reads the same file by itself); starting the run (train.py).
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaclip_model.training.config import TrainConfig
from tasks.progress import Report

RATE_STEPS = 20
"""Steps that speeds are means of."""
MAX_LINE_BYTES = 8192
"""Of one line of metrics, generously."""


class Follower:
    """Reads the metrics file as it grows and says how far training is."""

    def __init__(self, config: TrainConfig, metrics: Path, report: Report) -> None:
        self._config = config
        self._metrics = metrics
        self._report = report
        self._recent: list[dict[str, Any]] = []
        self.step = 0

    def report_newest(self) -> None:
        """Report the newest step, if there is a new one."""
        rows = last_rows(self._metrics, RATE_STEPS)
        if not rows or rows == self._recent:
            return
        self._recent = rows
        self.step = rows[-1]["step"]
        self._report(self.step, self._config.steps, describe_step(rows, self._config.steps))

    def report_event(self, what: str) -> None:
        """Report an event between steps."""
        self._report(self.step, self._config.steps, what)


def describe_step(rows: Sequence[Mapping[str, Any]], steps: int) -> str:
    """Loss, speed, the figures that go wrong first, time left, and what is out of order."""
    newest = rows[-1]
    seconds = _mean_of(rows, "step_s")
    shown = {
        "loss {:.3f}": newest.get("loss"),
        "{:,.0f} images/s": _mean_of(rows, "images_per_second"),
        "MFU {:.0%}": _mean_of(rows, "mfu"),
        "logit scale {:.1f}": newest.get("logit_scale"),
        "grad norm {:.3g}": newest.get("grad_norm"),
        "data wait {:.0%}": _share_of(_mean_of(rows, "data_wait_s"), seconds),
    }
    parts = [form.format(value) for form, value in shown.items() if value is not None]
    if seconds is not None:
        parts.append(f"{format_duration((steps - newest['step']) * seconds)} left")
    return "  ".join([*parts, *list_notes(rows)])


def list_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Irregularities in these rows: spikes, skipped steps, rollbacks, a slow rank."""
    found = []
    spikes = [row["step"] for row in rows if row.get("spike")]
    if spikes:
        found.append(f"spike at step {spikes[-1]:,}")
    lost = sum(row.get("taken", 1) == 0 for row in rows)
    if lost:
        found.append(f"{lost} of {len(rows)} steps not taken")
    if rows[-1].get("rollbacks"):
        found.append(f"went back {rows[-1]['rollbacks']} times")
    slow = Counter(row["slow_rank"] for row in rows if row.get("slow_rank") is not None)
    rank, count = slow.most_common(1)[0] if slow else (0, 0)
    if 2 * count > len(rows):
        found.append(f"rank {rank} keeps the others waiting")
    return found


def format_duration(seconds: float) -> str:
    """`3d 04:05:06`, without the days when there is none."""
    days, rest = divmod(int(seconds), 86_400)
    clock = time.strftime("%H:%M:%S", time.gmtime(rest))
    return f"{days}d {clock}" if days else clock


def last_rows(metrics: Path, count: int) -> list[dict[str, Any]]:
    """The newest whole lines about steps, oldest first."""
    try:
        with metrics.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = max(0, size - MAX_LINE_BYTES * count)
            file.seek(start)
            lines = file.read().split(b"\n")
    except FileNotFoundError:  # cut back at this moment, or not begun
        return []
    whole = lines[1 if start else 0 : -1]
    return [json.loads(line) for line in whole[-count:]]


def _mean_of(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if isinstance(row.get(name), int | float)]
    return sum(values) / len(values) if values else None


def _share_of(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole
