"""From metadata to a dataset version."""

from prefect import flow

from flows.config.form_types import Overrides, RecipeName
from flows.graph.runner import RecipeSession, open_session
from flows.reporting.crash_hook import close_tracking
from flows.reporting.prefect_artifacts import publish_sources
from tasks.adopt.config import STAGE as ADOPT
from tasks.artifacts.artifact import Artifact


@flow(name="prepare", on_crashed=[close_tracking], on_cancellation=[close_tracking])
def prepare(recipe: RecipeName = "demo", overrides: Overrides = ()) -> Artifact:
    """Merge the sources' metadata, download the images, verify every shard, choose samples.

    Args:
        recipe: Name of a recipe, or path of a .toml file.
        overrides: Changes to the recipe, each `table.key=value`.
    """
    with open_session("prepare", recipe, overrides) as session:
        return prepare_data(session)


def prepare_data(session: RecipeSession) -> Artifact:
    """Everything up to the recipe's dataset version; returns that. What was adopted and is less
    than training takes at once is refused."""
    for step in session.graph.data_steps:
        session.make_step(step)
        if step.stage is ADOPT:
            session.graph.require_samples()
    version = session.made[session.graph.dataset.digest]
    publish_sources(version, session.root)
    return version
