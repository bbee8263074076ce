"""The whole way from metadata to a registered model, and its three parts as flows of their own."""

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from flows.config.form_types import Overrides, RecipeName
from flows.graph.graph import Graph, load_graph
from flows.graph.runner import RecipeSession, open_session
from flows.graph.step import Step
from flows.planning import run_plan
from flows.promotion.apply_decision import (
    Promote,
    apply_decision,
    carry_out_answer,
    register_and_judge,
)
from flows.reporting.crash_hook import close_tracking
from flows.reporting.prefect_artifacts import publish_evaluation, publish_overview, publish_sources
from tasks.adopt.config import STAGE as ADOPT
from tasks.artifacts.artifact import Artifact


@flow(name="pipeline", on_crashed=[close_tracking], on_cancellation=[close_tracking])
def pipeline(
    recipe: RecipeName = "demo",
    overrides: Overrides = (),
    promote: Promote = "gate",
    dry_run: bool = False,
) -> None:
    """Prepare the data, train, evaluate, register; the gate decides which model is champion.

    Args:
        recipe: Name of a recipe, or path of a .toml file.
        overrides: Changes to the recipe, each `table.key=value`.
        promote: What happens to a better model. gate: it becomes champion; ask: once a person has
            said yes; never: it stays challenger.
        dry_run: Only write the plan: what would run, what is there, the sizes, does it fit here.
    """
    if dry_run:
        wanted, profile, graph = load_graph(recipe, overrides)
        machine = run_plan.Machine.this_machine(profile.root.resolve())
        fits = run_plan.summarise_findings(
            run_plan.recipe_findings(wanted, graph, profile, machine)
        )
        page = f"{run_plan.plan_markdown(wanted, graph)}\n\nDoes it fit this machine? {fits}"
        create_markdown_artifact(page, key="plan")
        return
    if carry_out_answer(recipe, overrides, promote) is not None:
        return
    with open_session("pipeline", recipe, overrides) as session:
        run_plan.check_disk(session.graph)
        prepare_data(session)
        session.graph.require_samples()
        session.make_all(session.graph.model_steps)
        registered = evaluate_and_register(session, session.graph)
        publish_overview(session, session.graph)
    apply_decision(session.recipe.registry, session.store, registered, promote)


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
