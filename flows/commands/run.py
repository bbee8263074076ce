"""`run FLOW RECIPE`: run a flow, or only say what it would do.

Covers: the flows there are, checks before the start, a Prefect server for the time of the run.
Not here: the flows themselves; prefect is imported only when one runs.
"""

from __future__ import annotations

import argparse
import importlib

from evaclip_model.errors import InputError
from flows.commands import plan
from flows.commands.recipe_arguments import with_gpus, with_recipe
from flows.config.profile import Profile
from flows.config.recipe import Recipe
from flows.console.terminal import console
from flows.graph.graph import Chart, load_chart
from flows.planning.run_plan import check_disk
from flows.reporting.results_table import print_results
from tasks.lineage.journal import JOURNALS
from tasks.tracking import TrackingStore

HELP = "run a flow"
FLOWS = {
    "pipeline": "metadata to registered model: prepare, train, evaluate, register",
    "prepare": "metadata to a dataset version: merge, download, verify, dataset",
    "train": "a dataset version to a model: initialise, then every training stage",
    "evaluate": "a trained model to its report and its registry entry: evaluate, register",
    "retrain": "what is new since the last model: merge, download, train on, compare, judge",
}
JUDGED = ("pipeline", "evaluate", "retrain")
"""Flows that end with the gate."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("flow", help=f"one of: {', '.join(FLOWS)}")
    with_recipe(parser)
    dry_run = "print the plan and stop; for train, try a step of each training stage too"
    parser.add_argument("--dry-run", action="store_true", help=dry_run)
    parser.add_argument(
        "--promote",
        choices=("gate", "never"),
        default="gate",
        help="whether a better model becomes champion, or stays challenger (gate)",
    )
    with_gpus(parser)


def run(parsed: argparse.Namespace) -> None:
    if parsed.flow not in FLOWS:
        raise InputError(f"unknown flow '{parsed.flow}'; there are: {', '.join(FLOWS)}")
    if parsed.dry_run:
        _dry_run(parsed)
        return
    recipe, profile, chart = load_chart(parsed.recipe, parsed.overrides)
    chart.require(parsed.flow)
    if parsed.flow == "pipeline" and _nothing_to_do(recipe, profile, chart):
        console.print(f"[bold]{recipe.name}[/]: everything is there, nothing to do")
        print_results(recipe, chart, profile)
        return
    if parsed.flow == "retrain" and _nothing_new(recipe, profile, chart):
        return
    if parsed.flow != "retrain":  # which downloads a part; the stage itself looks at the disk
        check_disk(recipe, chart, profile.root)
    from flows.graph.ephemeral_server import temporary_server  # starts processes: only for a run

    with temporary_server(profile.root):
        # the flow's module imports prefect, which reads its settings then
        flow = getattr(importlib.import_module(f"flows.{parsed.flow}"), parsed.flow)
        console.print(f"[bold]{recipe.name}[/]  {recipe.title}  ({recipe.digest})")
        judged = {"promote": parsed.promote} if parsed.flow in JUDGED else {}
        flow(recipe=parsed.recipe, overrides=parsed.overrides, **judged)
    if parsed.flow == "pipeline":
        print_results(recipe, chart, profile)


def _dry_run(parsed: argparse.Namespace) -> None:
    if parsed.flow == "retrain":
        _nothing_new(*load_chart(parsed.recipe, parsed.overrides), told=True)
        return
    plan.run(parsed)
    if parsed.flow == "train":
        from flows.planning.dry_run import rehearse  # starts processes

        for line in rehearse(*load_chart(parsed.recipe, parsed.overrides)):
            console.print(line, soft_wrap=True, markup=False)


def _nothing_new(recipe: Recipe, profile: Profile, chart: Chart, told: bool = False) -> bool:
    """Whether there is no new metadata, and nothing waits from the last time; says so, or with
    `told` whatever there is."""
    if recipe.demo and not (chart.demo and chart.demo.is_finished):
        return False  # its metadata is made first
    from flows.graph.incremental import describe, look  # imports duckdb
    from tasks.register.promotion import is_unsettled  # imports mlflow

    store = TrackingStore.at(profile.mlflow_uri, recipe.name)
    news = look(recipe, chart, store, keep_rejected=False)
    is_nothing = news.is_nothing and not (
        news.last and is_unsettled(store, recipe.registry, news.last.registered.folder)
    )
    if is_nothing or told:
        for line in describe(news, recipe):
            console.print(line, soft_wrap=True, markup=False)
    return is_nothing


def _nothing_to_do(recipe: Recipe, profile: Profile, chart: Chart) -> bool:
    """Whether everything is made, still registered, settled, and no killed run waits for its
    end."""
    if not chart.is_finished:
        return False
    from tasks.lineage.mlflow_store import Tracking  # imports mlflow, as the next one does
    from tasks.register.model_registry import forget_if_gone
    from tasks.register.promotion import is_unsettled

    store = TrackingStore.at(profile.mlflow_uri, recipe.name)
    forget_if_gone(chart.register, store)
    if not chart.is_finished or is_unsettled(store, recipe.registry, chart.register.folder):
        return False
    tracking = Tracking(store, profile.root.resolve() / JOURNALS)
    return not tracking.has_unfinished(recipe.digest)
