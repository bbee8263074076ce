"""The whole way: from metadata to a registered model."""

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from flows.config.form_types import Overrides, RecipeName
from flows.evaluate import evaluate_and_register
from flows.graph.graph import load_graph
from flows.graph.runner import open_session
from flows.planning import run_plan
from flows.prepare import prepare_data
from flows.promotion.apply_decision import Promote, apply_decision, carry_out_answer
from flows.reporting.crash_hook import close_tracking
from flows.reporting.prefect_artifacts import publish_overview


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
