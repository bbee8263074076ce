"""What a person watching a run sees: one line a stage, a moving bar on long work.

Covers: the terminal's bar, and the same progress as a Prefect artifact in the UI.
Not here: the bar itself (terminal.py), the work, or what it reports.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from flows.console.terminal import console, moving_bar, summarise_counts
from tasks.artifacts.artifact import Artifact
from tasks.progress import Report

PREFECT_EVERY_S = 5.0


@contextmanager
def watch_stage(title: str, *, already_there: bool = False) -> Iterator[Report]:
    """Show one stage under way; yields the `Report` to hand to it."""
    if already_there:
        yield _ignore_progress
        return
    in_ui = _PrefectProgress(title)
    with moving_bar(title) as show:

        def report(done: float, total: float, detail: str = "") -> None:
            show(done, total, detail)
            in_ui.update(done, total, detail)

        yield report


def _ignore_progress(done: float, total: float, detail: str = "") -> None:
    """Progress of an artifact that is already there."""


class _PrefectProgress:
    """One progress artifact, written every few seconds and at the end: each write is a request."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._artifact: UUID | None = None
        self._next = 0.0

    def update(self, done: float, total: float, detail: str) -> None:
        if not total or (time.monotonic() < self._next and done < total):
            return
        self._next = time.monotonic() + PREFECT_EVERY_S
        percent = 100.0 * done / total
        description = f"{self._title}: {detail}" if detail else self._title
        if self._artifact is None:
            made = create_progress_artifact(percent, description=description)
            self._artifact = cast(UUID, made)  # a coroutine only inside async flows
        else:
            update_progress_artifact(self._artifact, percent, description)


def say_done(title: str, artifact: Artifact, *, seconds: float, reused: bool) -> None:
    """Print the one line that stays: what was made, how much, how long it took; the run's log in
    the UI gets it, too."""
    summary = summarise_counts(artifact.counts)
    mark, took = ("[dim]=[/]", "already there") if reused else ("[green]✓[/]", f"{seconds:.0f} s")
    get_run_logger().info("%s: %s; %s, %s", title, summary, artifact.folder, took)
    console.print(
        f"{mark} {title:<14} {summary:<60} [dim]{artifact.digest[:8]}  {took}[/]", soft_wrap=True
    )
