"""One step of every training stage that can be tried, thrown away: does it fit, does it work.

Covers: `python -m flows run train RECIPE --dry-run`: starting the ranks as a run would, and what
they report of memory, time and their self-test.
Not here: the plan (run_plan.py); what a rank does (`dry_run` of evaclip_model/training/trainer.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from evaclip_model.reading.samples import SHARDS
from evaclip_model.training.config import MODEL_FOLDER
from flows.config.profile import Profile
from flows.config.recipe import Recipe
from flows.graph.graph import Graph
from flows.graph.step import Role, Step
from tasks.progress import report_nothing
from tasks.train.train import Inputs, try_out


def rehearse_training(recipe: Recipe, profile: Profile, graph: Graph) -> Iterator[str]:
    """Try every training stage whose data and starting weights are there; one line for each.

    Raises:
        InputError: a stage cannot work, in the words of the run that would fail.
    """
    for config, step in zip(recipe.train, graph.train, strict=True):
        start = step.inputs[Role.START]
        assert isinstance(start, Step), "a recipe starts from weights that it makes"
        missing = [one.stage.name for one in (graph.dataset, start) if not one.is_finished]
        if missing:
            yield f"{config.name}: not tried, {missing[0]} has not run yet"
            continue
        inputs = Inputs(start.folder / MODEL_FOLDER, graph.dataset.folder / SHARDS)
        # Under the root, which all machines of a launch see.
        with TemporaryDirectory(dir=profile.root.resolve(), prefix=".dry-run-") as folder:
            found = try_out(config, inputs, Path(folder), profile.launch, report_nothing)
        yield f"{config.name}: {_describe_result(found)}"


def _describe_result(found: dict[str, Any]) -> str:
    seconds = found["data_wait_s"] + found["prepare_s"] + found["gradient_s"]
    return (
        f"a step works on {found['ranks']} ranks ({found['device']}) with {found['micro_batch']:,} "
        f"pairs at once: {found['memory_peak_bytes'] / 1e9:.1f} GB a rank, {seconds:.1f} s for the "
        f"first, loss {found['loss']:.3f}"
    )
