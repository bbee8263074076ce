"""From a dataset version to a trained model."""

from prefect import flow

from flows.config.form_types import Overrides, RecipeName
from flows.graph.runner import open_session
from flows.reporting.crash_hook import close_tracking
from tasks.artifacts.artifact import Artifact


@flow(name="train", on_crashed=[close_tracking], on_cancellation=[close_tracking])
def train(recipe: RecipeName = "demo", overrides: Overrides = ()) -> Artifact:
    """Make the starting weights, then run every training stage of the recipe.

    Args:
        recipe: Name of a recipe, or path of a .toml file.
        overrides: Changes to the recipe, each `table.key=value`.
    """
    with open_session("train", recipe, overrides) as session:
        session.require_finished(session.graph.dataset, "prepare")
        session.graph.require_samples()
        session.make_all(session.graph.model_steps)
        return session.made[session.graph.train[-1].digest]
