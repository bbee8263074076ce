"""One execution of a flow: making its steps, each with progress, tracking and a line for a person.
The chunks of a merge are tasks of their own, on whatever the flow's task runner has. Not here:
which steps, in which order (flows/graph/graph.py and the flows)."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast
from uuid import UUID

from prefect import artifacts, get_run_logger, runtime, task
from prefect.futures import as_completed

from evaclip_model.errors import InputError, escape_control
from evaclip_model.files import lock_file
from flows.config.profile import Profile
from flows.config.recipe import Recipe
from flows.graph.graph import Graph, load_graph
from flows.graph.step import Step, digest_of, finished_artifact
from flows.reporting.terminal import console, moving_bar, summarise_counts
from tasks.artifacts.artifact import ROOT_LOCK, Artifact, Made
from tasks.artifacts.root_store import fetch_artifact
from tasks.lineage.journal import JOURNALS
from tasks.lineage.mlflow_store import PipelineRun, Tracking
from tasks.merge.config import MergeConfig
from tasks.merge.database import share_of_memory
from tasks.merge.merge import merge_sources
from tasks.merge.merge_plan import Files
from tasks.merge.units import Chunk, run_chunk
from tasks.progress import Report, report_nothing
from tasks.tracking import TrackingStore

PREFECT_EVERY_S = 5.0
"""Time between two reports at first, up to a minute later: each is an event in the database."""


@task(retries=0, persist_result=False)
def run_step(make: Callable[[], Artifact]) -> Artifact:
    """One step of the graph. What it is finished by is its manifest, never Prefect's cache."""
    return make()


@dataclass(frozen=True)
class Session:
    """The state that the steps of one execution share."""

    profile: Profile
    run: PipelineRun
    made: dict[str, Artifact] = field(default_factory=dict)
    """Digest -> what was made or found so far."""

    @property
    def root(self) -> Path:
        return self.profile.root.resolve()

    def make_step(self, step: Step) -> Artifact:
        """Make one step, or find it finished, and record it."""
        is_reused, started = step.is_finished, time.monotonic()
        digests = map(digest_of, step.inputs.values())
        before = [self.made[digest] for digest in digests if digest in self.made]
        named = run_step.with_options(name=step.stage.name, task_run_name=step.title)
        with self.run.stage_run(step.address, step.title) as tracked:
            metrics = step.record.metrics
            following = tracked.follow_metrics(step.folder / metrics) if metrics else nullcontext()
            with following, watch_stage(step.title, already_there=is_reused) as report:
                artifact = named(partial(step.make_artifact, self.profile, report), wait_for=before)
                report(1, 1, summarise_counts(artifact.counts))
            tracked.record_artifact(
                artifact,
                inputs={name: finished_artifact(one) for name, one in step.record.datasets.items()},
                outside=step.record.outside(artifact),
                attach=[fetch_artifact(step.folder, file) / file for file in step.record.files],
            )
        # The one line that stays; the run's log in the UI gets it, too.
        seconds, summary = time.monotonic() - started, summarise_counts(artifact.counts)
        mark, took = ("=", "already there") if is_reused else ("✓", f"{seconds:.0f} s")
        get_run_logger().info("%s: %s; %s, %s", step.title, summary, artifact.folder, took)
        console.print(mark, style="dim" if is_reused else "green", end=" ")
        console.print(f"{step.title:<14} {summary:<60}", end=" ", soft_wrap=True)
        console.print(f"{artifact.digest[:8]}  {took}", style="dim", soft_wrap=True)
        self.made[artifact.digest] = artifact
        return artifact

    def make_all(self, steps: Iterable[Step]) -> None:
        for step in steps:
            self.make_step(step)


@dataclass(frozen=True)
class RecipeSession(Session):
    recipe: Recipe = field(kw_only=True)
    graph: Graph = field(kw_only=True)
    store: TrackingStore = field(kw_only=True)

    def require_finished(self, step: Step, made_by: str) -> None:
        """Refuse to go on without a step that the flow `made_by` makes."""
        if not step.is_finished:
            raise InputError(
                f"{step.stage.name} has not run for this recipe yet: first run "
                f"`python -m flows run {made_by} {self.recipe.name}` with the same settings"
            )


@contextmanager
def open_session(flow: str, recipe: str, overrides: Sequence[str]) -> Iterator[RecipeSession]:
    """The session of a flow of this name, which runs a recipe."""
    resolved, profile, graph = load_graph(recipe, overrides)
    graph.require_runnable(flow)
    name, text = resolved.name, resolved.to_json()
    params = {"recipe": name, "flow": flow, "overrides": " ".join(overrides)}
    with track_run(profile, name, f"{flow} {name}", resolved.digest, params, text) as run:
        store = TrackingStore.at(profile.mlflow_uri, name)
        yield RecipeSession(profile, run, recipe=resolved, graph=graph, store=store)


@contextmanager
def track_run(
    profile: Profile,
    experiment: str,
    name: str,
    digest: str,
    params: Mapping[str, str],
    recipe: str = "",
) -> Iterator[PipelineRun]:
    """The tracking run of this flow run, linked both ways; meanwhile `prune` cannot remove."""
    root = profile.root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    lock = lock_file(root / ROOT_LOCK, shared=True)
    if lock is None:
        raise InputError(f"`prune` is removing what is left over under {root}: wait for its end")
    store = TrackingStore.at(profile.mlflow_uri, experiment)
    tracking = Tracking(store, root / JOURNALS, openlineage=profile.openlineage_file)
    ui_url = runtime.flow_run.ui_url if os.environ.get("PREFECT_UI_URL") else None
    note = {"mlflow.note.content": f"[Prefect run]({ui_url})"} if ui_url else {}
    tags = {"prefect.flow_run_id": str(runtime.flow_run.id), **note}
    started = tracking.pipeline_run(name, digest, recipe=recipe, params=params, tags=tags)
    with lock, started as run:
        if url := run.url():
            artifacts.create_link_artifact(link=url, link_text="MLflow run", key="mlflow-run")
        yield run


@contextmanager
def watch_stage(title: str, *, already_there: bool = False) -> Iterator[Report]:
    if already_there:
        yield report_nothing
        return
    in_ui: UUID | None = None
    begin_s, again_at, told = time.monotonic(), 0.0, -1.0
    with moving_bar(title) as show:

        def report(done: float, total: float, detail: str = "") -> None:
            nonlocal in_ui, again_at, told
            show(done, total, detail)
            now = time.monotonic()
            if not total or (now < again_at and (done < total or done == told)):
                return
            again_at, told = now + min(max(PREFECT_EVERY_S, (now - begin_s) / 10), 60), done
            percent = 100.0 * done / total
            description = escape_control(f"{title}: {detail}" if detail else title)
            if in_ui is None:
                made = artifacts.create_progress_artifact(percent, description=description)
                in_ui = cast(UUID, made)  # a coroutine only inside async flows
            else:
                artifacts.update_progress_artifact(in_ui, percent, description)

        yield report


def merge_in_chunks(
    config: MergeConfig,
    files: Files,
    out: Path,
    report: Report,
    workers: int,
    given: Sequence[Path],
) -> Made:
    """Merge `files` (source name -> its files) into `out`, without what the merges in `given` have
    selected.

    With several `workers` every phase is that many tasks, on whatever the flow's task runner has,
    which must share the artifact's folder; each gets its part of the memory limit and the cores.
    """
    if workers == 1:
        return merge_sources(config, files, out, report, given=given)
    return merge_sources(
        *(config, files, out, report),
        threads=max(1, (os.cpu_count() or 1) // workers),
        run=_run_as_tasks,  # Spark has a runner of its own
        chunks=workers,
        memory_limit=share_of_memory(config.memory_limit, workers),
        given=given,
    )


@task(
    name="merge-chunk",
    persist_result=False,
    retries=2,
    retry_delay_seconds=5,
    retry_condition_fn=lambda task, run, state: (
        not isinstance(state.result(raise_on_failure=False), InputError)
    ),
)
def merge_chunk(chunk: Chunk) -> list[int]:
    """Some units of one phase; what is finished of them is not done again."""
    return list(run_chunk(chunk))


def _run_as_tasks(chunks: Sequence[Chunk]) -> Iterator[int]:
    for future in as_completed([merge_chunk.submit(chunk) for chunk in chunks]):
        yield from future.result()
