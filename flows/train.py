"""From a dataset version to a trained model."""

from __future__ import annotations

from prefect import flow

from evaclip_model.training.config import METRICS_FILE, RESULT_FILE
from flows.config.form_types import Handed, Overrides, RecipeName
from flows.graph.runner import open_session
from flows.reporting.crash_hook import close_tracking
from tasks.artifacts.artifact import Artifact
from tasks.initialise.task import initialise
from tasks.train.task import train_stage


@flow(name="train", on_crashed=[close_tracking], on_cancellation=[close_tracking])
def train(
    recipe: RecipeName = "demo", overrides: Overrides = (), shards: Handed = None
) -> Artifact:
    """Make the starting weights, then run every training stage of the recipe.

    Args:
        recipe: Name of a recipe, or path of a .toml file.
        overrides: Changes to the recipe, each `table.key=value`.
        shards: What `prepare` made; by default looked up from the recipe.
    """
    with open_session("train", recipe, overrides) as session:
        chart, wanted = session.chart, session.recipe
        shards = shards or session.finished(chart.dataset, "prepare")
        model = session.make(initialise, chart.initialise, wanted.initialise)
        for config, address in zip(wanted.train, chart.train, strict=True):
            model = session.make(
                *(train_stage, address, config, model, shards, session.profile.launch),
                title=f"train {config.name}",
                inputs={"training": shards},
                attach=(METRICS_FILE, RESULT_FILE),
                follow=METRICS_FILE,
            )
        return model
