"""One execution of a flow: its recipe, its chart, its MLflow run, and making its artifacts.

Covers: opening a session (a subflow joins its parent's), and `Session.make`, which surrounds every
stage with progress, tracking and the line a person sees.
Not here: which stages, in which order.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import Task, runtime
from prefect.artifacts import create_link_artifact

from evaclip_model.errors import InputError
from flows.config.profile import Profile
from flows.config.recipe import Recipe
from flows.console.stage_progress import say_done, watching
from flows.console.terminal import summarise
from flows.graph.graph import Chart, load_chart
from tasks.artifacts.artifact import Address, Artifact, read_artifact
from tasks.lineage.journal import JOURNALS
from tasks.lineage.mlflow_store import PipelineRun, Tracking
from tasks.tracking import TrackingStore


@dataclass(frozen=True)
class Session:
    """What the stages of one execution share."""

    recipe: Recipe
    profile: Profile
    chart: Chart
    store: TrackingStore
    run: PipelineRun

    @property
    def root(self) -> Path:
        """Absolute folder of all artifacts."""
        return self.profile.root.resolve()

    def finished(self, address: Address, made_by: str) -> Artifact:
        """The artifact at `address`, which the flow `made_by` makes.

        Raises:
            InputError: it is not there yet.
        """
        if not address.is_finished:
            raise InputError(
                f"{address.stage.name} has not run for this recipe yet: first run "
                f"`python -m flows run {made_by} {self.recipe.name}` with the same settings"
            )
        return read_artifact(address.folder)

    def make(
        self, task: Task[..., Artifact], address: Address, *rest: Any, **more: Any
    ) -> Artifact:
        """`make` in this execution's run."""
        return make(self.run, task, address, *rest, **more)


def make(
    run: PipelineRun,
    task: Task[..., Artifact],
    address: Address,
    *arguments: Any,
    title: str | None = None,
    after: Sequence[Artifact] = (),
    inputs: Mapping[str, Artifact] | None = None,
    outside: Callable[[Artifact], Sequence[Mapping[str, str]]] | None = None,
    attach: Sequence[str] = (),
    follow: str | None = None,
) -> Artifact:
    """Run the stage task `task(address, *arguments, report)` and record what it made.

    Args:
        run: the tracking run that the stage's is part of.
        title: what people see; the stage's name by default.
        after: what the stage needs and is not handed, for the arrows of the run's graph.
        inputs: context -> data the stage read, for the tracking run's datasets.
        outside: what else the stage read that no stage made, told by what it made.
        attach: files of the artifact that are kept with the tracking run.
        follow: a metrics file of the artifact that is streamed to tracking while it grows.
    """
    title = title or address.stage.name
    reused = address.is_finished
    started = time.monotonic()
    with run.stage_run(address, title) as tracked:
        following = tracked.follow(address.folder / follow) if follow else nullcontext()
        with following, watching(title, already_there=reused) as report:
            named = task.with_options(task_run_name=title)
            artifact = named(address, *arguments, report, wait_for=after)
            report(1, 1, summarise(artifact.counts))
        tracked.done(
            artifact,
            inputs=inputs,
            outside=outside(artifact) if outside else (),
            attach=[artifact.folder / a for a in attach],
        )
    say_done(title, artifact, seconds=time.monotonic() - started, reused=reused)
    return artifact


_open: ContextVar[Session | None] = ContextVar("session", default=None)
"""The session of the flow around this one: subflows cannot be handed objects, only plain values."""


@contextmanager
def open_session(flow: str, recipe: str, overrides: Sequence[str]) -> Iterator[Session]:
    """The session of this execution; inside another flow's session, that one.

    Raises:
        InputError: the recipe, an override or the profile is wrong.
    """
    around = _open.get()
    if around is not None:
        yield around
        return
    resolved, profile, chart = load_chart(recipe, overrides)
    chart.require(flow)
    store = TrackingStore.at(profile.mlflow_uri, resolved.name)
    journals = profile.root.resolve() / JOURNALS
    tracking = Tracking(store, journals, openlineage=profile.openlineage_file)
    ui_url = runtime.flow_run.ui_url if os.environ.get("PREFECT_UI_URL") else None
    with tracking.pipeline_run(
        f"{flow} {resolved.name}",
        resolved.digest,
        recipe=resolved.to_json(),
        params={"recipe": resolved.name, "flow": flow, "overrides": " ".join(overrides)},
        tags={"prefect.flow_run_id": str(runtime.flow_run.id)},
        links={"Prefect run": ui_url} if ui_url else None,
    ) as run:
        session = Session(resolved, profile, chart, store, run)
        token = _open.set(session)
        try:
            url = run.url()
            if url:
                create_link_artifact(link=url, link_text="MLflow run", key="mlflow-run")
            yield session
        finally:
            _open.reset(token)
