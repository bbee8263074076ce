"""From a trained model to its report and its place in the registry."""

from prefect import flow

from flows.config.form_types import Overrides, RecipeName
from flows.graph.graph import Graph
from flows.graph.runner import RecipeSession, open_session
from flows.graph.step import Step
from flows.promotion.apply_decision import (
    Promote,
    apply_decision,
    carry_out_answer,
    register_and_judge,
)
from flows.reporting.crash_hook import close_tracking
from flows.reporting.prefect_artifacts import publish_evaluation
from tasks.artifacts.artifact import Artifact


@flow(name="evaluate", on_crashed=[close_tracking], on_cancellation=[close_tracking])
def evaluate(
    recipe: RecipeName = "demo", overrides: Overrides = (), promote: Promote = "gate"
) -> Artifact:
    """Evaluate the trained beside the untrained model, write the report, register the model, and
    let the gate decide whether it becomes champion.

    Args:
        recipe: Name of a recipe, or path of a .toml file.
        overrides: Changes to the recipe, each `table.key=value`.
        promote: What happens to a better model. gate: it becomes champion; ask: once a person has
            said yes; never: it stays challenger.
    """
    if (answered := carry_out_answer(recipe, overrides, promote)) is not None:
        return answered
    with open_session("evaluate", recipe, overrides) as session:
        for model in session.graph.evaluate.inputs.values():
            if isinstance(model, Step) and model in session.graph.model_steps:
                session.require_finished(model, "train")
        registered = evaluate_and_register(session, session.graph)
    apply_decision(session.recipe.registry, session.store, registered, promote)
    return registered


def evaluate_and_register(session: RecipeSession, graph: Graph) -> Artifact:
    """The graph's evaluation and its registration with the gate's decision; returns that."""
    evaluated = session.make_step(graph.evaluate)
    publish_evaluation(evaluated, session.run.stage_url(graph.evaluate.address))
    return register_and_judge(session, graph)
