"""Any models on any sets, outside a recipe's training: figures and a report, nothing registered.
Not here: what the flow's arguments mean (flows/graph/score_request.py), figures
(tasks/evaluate)."""

from typing import Annotated

from prefect import flow
from pydantic import Field

from flows.config.profile import load_profile
from flows.config.recipe_loader import Overrides
from flows.graph.outside_data import fetch_models
from flows.graph.runner import Session, track_run
from flows.graph.score_request import read_asked
from flows.reporting.crash_hook import close_tracking
from flows.reporting.prefect_artifacts import publish_evaluation
from tasks.artifacts.artifact import Artifact
from tasks.evaluate.sets.set_registry import FOLDER

EXPERIMENT = "scores"  # of the tracking store
Models = Annotated[list[str], Field(min_length=1)]
Recipe = Annotated[str, Field(pattern=r"^$|^[A-Za-z0-9][\w.-]*$|^.+[.]toml$")]


@flow(name="score", on_crashed=[close_tracking], on_cancellation=[close_tracking])
def score(
    models: Models,
    recipe: Recipe = "",
    sets: tuple[str, ...] = (),
    data: str = FOLDER,
    overrides: Overrides = (),
) -> Artifact:
    """Evaluate models side by side, the first one as the subject, and write the report.

    Args:
        models: Each a saved model's folder, WEIGHTS:ARCHITECTURE, open_clip:NAME/WEIGHTS,
            transformers:FOLDER, or models:/NAME@ALIAS of the registry; NAME=... before it names it.
        recipe: Recipe whose sets are taken; leave it out and name sets instead.
        sets: Sets of the registry, folders of your own in `data`, paths, or NAME=FOLDER; `paper`
            for all 33.
        data: Folder that holds the sets.
        overrides: Changes to the recipe, each `table.key=value`; with `sets`, to `evaluate`.
    """
    profile = load_profile()
    root = profile.root.resolve()
    asked = read_asked(models, recipe, sets, data, overrides, root)
    specs = fetch_models(asked.models, profile)
    step = asked.make_step(root, specs)
    params = {"flow": "score", "models": " ".join(models), "recipe": recipe}
    named = f"score {', '.join(specs)}"
    with track_run(profile, EXPERIMENT, named, step.digest, params) as run:
        made = Session(profile, run).make_step(step)
        publish_evaluation(made, run.stage_url(step.address, step.title))
    return made
