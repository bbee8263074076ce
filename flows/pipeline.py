"""The whole way: from metadata to a registered model."""

from __future__ import annotations

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from flows.chart import load_chart
from flows.evaluate import evaluate
from flows.gate import Promote, settle
from flows.parameters import Overrides, RecipeName
from flows.plan import check_disk, plan_markdown
from flows.prepare import prepare
from flows.results import results_markdown
from flows.session import open_session
from flows.train import train


@flow(name="pipeline")
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
        dry_run: Only write the plan: what would run, what is already there, and the sizes.
    """
    if dry_run:
        wanted, _, chart = load_chart(recipe, overrides)
        create_markdown_artifact(plan_markdown(wanted, chart), key="plan")
        return
    with open_session("pipeline", recipe, overrides) as session:
        check_disk(session.recipe, session.chart, session.root)
        shards = prepare(recipe, overrides)
        model = train(recipe, overrides, shards)
        registered = evaluate(recipe, overrides, model)
        create_markdown_artifact(results_markdown(session.recipe, session.chart), key="summary")
    settle(session, registered, promote)
