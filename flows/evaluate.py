"""From a trained model to its report and its place in the registry."""

from __future__ import annotations

from prefect import flow, runtime

from evaclip_model.training.config import METRICS_FILE, MODEL_FOLDER
from flows.config.form_types import Handed, Overrides, RecipeName
from flows.graph.runner import open_session
from flows.promotion.apply_decision import Promote, register_and_judge, settle
from flows.promotion.compare_models import measure
from flows.reporting.crash_hook import close_tracking
from flows.reporting.prefect_artifacts import publish_evaluation
from tasks.artifacts.artifact import Artifact


@flow(name="evaluate", on_crashed=[close_tracking], on_cancellation=[close_tracking])
def evaluate(
    recipe: RecipeName = "demo",
    overrides: Overrides = (),
    model: Handed = None,
    promote: Promote = "gate",
) -> Artifact:
    """Evaluate the trained beside the untrained model, write the report, register the model, and
    let the gate decide whether it becomes champion.

    Args:
        recipe: Name of a recipe, or path of a .toml file.
        overrides: Changes to the recipe, each `table.key=value`.
        model: What `train` made; by default looked up from the recipe.
        promote: What happens to a better model. gate: it becomes champion; ask: once a person has
            said yes; never: it stays challenger.
    """
    with open_session("evaluate", recipe, overrides) as session:
        chart = session.chart
        model = model or session.finished(chart.train[-1], "train")
        untrained = session.finished(chart.initialise, "train")
        evaluated = measure(
            session,
            chart.evaluate,
            {"trained": model.folder / MODEL_FOLDER, "untrained": untrained.folder / MODEL_FOLDER},
            [address.folder / METRICS_FILE for address in chart.train],
            chart.dataset,
        )
        publish_evaluation(evaluated, session.run.stage_url(chart.evaluate))
        registered = register_and_judge(session, chart.register, model, evaluated)
    if runtime.flow_run.parent_flow_run_id is None:
        settle(session.recipe.registry, session.store, registered, promote)
    return registered
