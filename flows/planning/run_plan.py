"""What a run would do, before it does it.

Covers: one row a stage (there, unfinished, to make), its size, and the disk it needs.
Not here: making anything; what a real recipe's data (data_cost.py) and training
(training_cost.py) cost.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from evaclip_model.errors import InputError
from flows.config.recipe import Recipe
from flows.console.terminal import summarise_counts
from flows.graph.graph import Graph
from flows.graph.step import Step, finished_artifact

SMALL_BYTES = 50_000_000
"""Reports, databases, what else a run leaves."""


@dataclass(frozen=True)
class PlanRow:
    """One stage of the plan."""

    title: str
    state: str
    """"there", "unfinished" or "to make"."""
    size: str
    """How much, for a person."""
    digest: str
    """"not known" as long as something it is made from is not here."""
    folder: Path


def make_plan(graph: Graph) -> list[PlanRow]:
    """The plan's rows, in the order of work."""
    rows = []
    for step in graph.steps:
        size = summarise_counts(finished_artifact(step).counts) if step.is_finished else step.what
        digest = step.digest if step.is_settled else "not known"
        rows.append(PlanRow(step.title, _step_state(step), size, digest, step.folder))
    return rows


def check_disk(graph: Graph) -> None:
    """Refuse a run that the disk cannot hold.

    Raises:
        InputError: less is free than unfinished stages write at least, or the root of all artifacts
            cannot be made.
    """
    root = graph.site.root
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the folder of all artifacts, {root}, cannot be made ({error.strerror}): "
            "set EVACLIP_ROOT to another one"
        ) from None
    needed, free = disk_bytes(graph), shutil.disk_usage(root).free
    if free < needed:
        raise InputError(
            f"the disk of {root} has {free / 1e9:.1f} GB free and this run needs about "
            f"{needed / 1e9:.1f} GB: free some, or set EVACLIP_ROOT to another disk"
        )


def disk_bytes(graph: Graph) -> int:
    """What the steps that are not finished write at least."""
    needed = [step.expected_bytes for step in graph.steps if not step.is_finished]
    return sum(needed) + SMALL_BYTES if needed else 0


def _step_state(step: Step) -> str:
    if step.is_finished:
        return "there"
    return "unfinished" if step.folder.is_dir() and any(step.folder.iterdir()) else "to make"


def plan_markdown(recipe: Recipe, graph: Graph) -> str:
    """The plan as a Markdown table."""
    head = [
        f"# Plan of {recipe.name}",
        "",
        "| stage | state | what | digest |",
        "|---|---|---|---|",
    ]
    rows = [
        f"| {row.title} | {row.state} | {row.size} | `{row.digest}` |" for row in make_plan(graph)
    ]
    return "\n".join([*head, *rows])
