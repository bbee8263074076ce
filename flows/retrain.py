"""Scheduled retraining: what is new since the last time, from metadata to a judged model. Not here:
what is new (flows/graph/incremental.py), the gate (tasks/register/gate.py), when it runs
(infra/prefect.yaml)."""

from typing import Annotated

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from pydantic import Field

from flows.config.form_types import Overrides, RecipeName
from flows.config.recipe import Recipe
from flows.graph import incremental
from flows.graph.graph import data_steps, load_graph, verify_step
from flows.graph.incremental import News, of_kind, rows_of
from flows.graph.runner import open_session
from flows.pipeline import evaluate_and_register, prepare_data
from flows.promotion.apply_decision import (
    Promote,
    apply_decision,
    carry_out_answer,
    champion_beside,
)
from flows.reporting.crash_hook import close_tracking
from flows.reporting.prefect_artifacts import publish_overview
from flows.reporting.terminal import console
from tasks.adopt.config import STAGE as ADOPT
from tasks.artifacts.artifact import Artifact, Role
from tasks.merge.config import STAGE as MERGE
from tasks.register.promotion import read_decision
from tasks.tracking import TrackingStore


@flow(name="retrain", on_crashed=[close_tracking], on_cancellation=[close_tracking])
def retrain(
    recipe: RecipeName = "demo",
    overrides: Overrides = (),
    promote: Promote = "gate",
    min_new_rows: Annotated[int, Field(ge=1)] = 1,
    keep_rejected: bool = False,
    dry_run: bool = False,
) -> Artifact | None:
    """Look for new data; if there is any, download or adopt that alone, train on from the champion,
    compare, and let the gate decide. Nothing new: it ends, saying so.

    Args:
        recipe: Name of a recipe, or path of a .toml file.
        overrides: Changes to the recipe, each `table.key=value`.
        promote: What happens to a better model. gate: it becomes champion; ask: once a person has
            said yes; never: it stays challenger.
        min_new_rows: Fewer new rows than this wait for the next time.
        keep_rejected: Train on the data of rejected models again, instead of setting it aside.
        dry_run: Only say what is new.
    """
    if (answered := carry_out_answer(recipe, overrides, promote)) is not None:
        return answered
    wanted, profile, graph = load_graph(recipe, overrides)
    store = TrackingStore.at(profile.mlflow_uri, wanted.name)
    if graph.site.demo and not graph.site.demo.is_finished:
        with open_session("retrain", recipe, overrides) as session:
            session.make_step(graph.site.demo)
        graph = load_graph(recipe, overrides)[2]
    news = incremental.find_new_data(wanted, graph, store, keep_rejected)
    for line in incremental.describe_new_data(news, wanted):
        console.print(line, soft_wrap=True)
    if dry_run or news.is_nothing:
        _publish_news(wanted, news, "nothing was made")
        if not dry_run:
            _settle_last(wanted, store, news, promote)
        return None
    with open_session("retrain", recipe, overrides) as session:
        if news.is_first:
            prepare_data(session)
        else:
            steps = (incremental.new_merge_step, incremental.new_adopt_step)
            new = [step for declare in steps if (step := declare(wanted, graph, news))]
            begun = [*news.waiting, *map(session.make_step, new)]
            merges, adoptions = of_kind(MERGE, begun), of_kind(ADOPT, begun)
            site, rules = graph.site, wanted.verify
            adopted = [verify_step(site, rules, one, Role.ADOPT) for one in adoptions]
            samples = sum(int(session.make_step(step).counts["samples"]) for step in adopted)
            rows = rows_of(merges) + samples
            if rows < min_new_rows:
                few = f"{rows:,} new rows, {min_new_rows:,} are asked for: they wait"
                end = few if rows else "nothing new: no row of the new files is new"
                console.print(end)
                _publish_news(wanted, news, end)
                _settle_last(wanted, store, news, promote)
                return None
            parts = [data_steps(site, wanted, merge) for merge in merges if rows_of([merge])]
            parts += adopted
            champion = champion_beside(session, news.champion) if news.champion else None
            graph = incremental.draw_retraining(wanted, graph, news, [*news.used, *parts], champion)
            session.make_all(graph.data_steps)
        graph.require_samples()
        session.make_all(graph.model_steps)
        registered = evaluate_and_register(session, graph)
        _publish_news(wanted, news, read_decision(registered.folder).summary)
        publish_overview(session, graph)
    apply_decision(wanted.registry, store, registered, promote)
    return registered


def _settle_last(recipe: Recipe, store: TrackingStore, news: News, wanted: Promote) -> None:
    """Carry out what the gate said of the last model, where a run was killed before it did."""
    if news.last is not None:
        apply_decision(recipe.registry, store, news.last.registered, wanted)


def _publish_news(recipe: Recipe, news: News, end: str) -> None:
    lines = "\n".join(incremental.describe_new_data(news, recipe))
    page = f"# Retraining of {recipe.registry.model_name}\n\n```\n{lines}\n```\n\n{end}\n"
    create_markdown_artifact(page, key="retraining")
