"""What a run would do, before it does it.

Covers: one row a stage (there, unfinished, to make), its size, and the disk it needs.
Not here: making anything; what a real recipe's data (estimate.py) and training
(training_estimate.py) cost.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from evaclip_model.errors import InputError
from evaclip_model.training.cost import parameter_counts
from flows.config.recipe import Recipe
from flows.console.terminal import summarise
from flows.graph.graph import Chart
from flows.planning.data_cost import expected_samples
from tasks.artifacts.artifact import Address, read_artifact
from tasks.download.url_tables import expected_bytes

BYTES_PER_PARAMETER_SAVED = 4 + 8
"""A checkpoint: fp32 weights and two moments."""
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


def stage_titles(recipe: Recipe, chart: Chart) -> dict[str, Address]:
    """Title -> address, in the order of work; training stages carry their own names."""
    titles = {
        address.stage.name: address for address in chart.steps() if address not in chart.train
    }
    trained = {
        f"train {stage.name}": at for stage, at in zip(recipe.train, chart.train, strict=True)
    }
    before = {name: titles.pop(name) for name in ("evaluate", "register")}
    return {**titles, **trained, **before}


def make_plan(recipe: Recipe, chart: Chart) -> list[PlanRow]:
    """The plan's rows, in the order of work."""
    sizes, unsettled = _expected_sizes(recipe), chart.unsettled()
    rows = []
    for title, address in stage_titles(recipe, chart).items():
        size = sizes[title]
        if address.is_finished:
            size = summarise(read_artifact(address.folder).counts)
        digest = "not known" if address.digest in unsettled else address.digest
        rows.append(PlanRow(title, _state(address), size, digest, address.folder))
    return rows


def check_disk(recipe: Recipe, chart: Chart, root: Path) -> None:
    """Refuse a run that the disk cannot hold.

    Raises:
        InputError: less is free than unfinished stages write at least, or `root` cannot be made.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the folder of all artifacts, {root}, cannot be made ({error.strerror}): "
            "set EVACLIP_ROOT to another one"
        ) from None
    needed, free = disk_bytes(recipe, chart), shutil.disk_usage(root).free
    if free < needed:
        raise InputError(
            f"the disk of {root} has {free / 1e9:.1f} GB free and this run needs about "
            f"{needed / 1e9:.1f} GB: free some, or set EVACLIP_ROOT to another disk"
        )


def disk_bytes(recipe: Recipe, chart: Chart) -> int:
    """What the stages that are not finished write at least, one checkpoint of each model."""
    needed = 0 if chart.download.is_finished else _download_bytes(recipe)
    needed += 0 if chart.is_finished else SMALL_BYTES
    if not all(address.is_finished for address in chart.train):
        parameters = sum(parameter_counts(recipe.initialise.architecture()).values())
        needed += parameters * BYTES_PER_PARAMETER_SAVED
    return needed


def _state(address: Address) -> str:
    if address.is_finished:
        return "there"
    return "unfinished" if address.folder.is_dir() and any(address.folder.iterdir()) else "to make"


def _expected_sizes(recipe: Recipe) -> dict[str, str]:
    targets = [source.target_count for source in recipe.merge.sources]
    rows = f"{sum(t for t in targets if t):,} rows" if all(targets) else "every row that passes"
    sizes = {
        "demo": "metadata and evaluation sets of the demo web",
        "merge": f"at most {rows} from {len(targets)} sources",
        "download": f"about {_size(_download_bytes(recipe))}, {recipe.download.image_px} px",
        "verify": "every shard opened, every image decoded",
        "dataset": "what is left out, as tombstones; a card",
        "initialise": f"model {recipe.initialise.model}",
        "evaluate": f"{len(recipe.evaluate.sets)} sets, trained and untrained model",
        "register": f"{recipe.registry.model_name}@{recipe.registry.alias}",
    }
    for stage in recipe.train:
        sizes[f"train {stage.name}"] = (
            f"{stage.steps:,} steps of {stage.global_batch:,} = {stage.samples_seen:,} samples"
        )
    return sizes


def _download_bytes(recipe: Recipe) -> int:
    return expected_bytes(expected_samples(recipe), recipe.download.image_px)


def _size(number: int) -> str:
    return f"{number / 1e12:,.1f} TB" if number >= 1e12 else f"{number / 1e6:,.0f} MB"


def plan_markdown(recipe: Recipe, chart: Chart) -> str:
    """The plan as a Markdown table."""
    head = [
        f"# Plan of {recipe.name}",
        "",
        "| stage | state | what | digest |",
        "|---|---|---|---|",
    ]
    rows = [
        f"| {row.title} | {row.state} | {row.size} | `{row.digest}` |"
        for row in make_plan(recipe, chart)
    ]
    return "\n".join([*head, *rows])
