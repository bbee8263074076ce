"""`run FLOW RECIPE` and `score MODEL...`: run a flow, or only say what it would do.

prefect is imported only when a flow runs, behind a Prefect server for that time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Option

from evaclip_model.errors import InputError
from flows.commands import recipes
from flows.commands.recipes import FLOWS, Gpus, Overrides, RecipeName, Utilisation
from flows.config.profile import Profile, load_profile
from flows.config.recipe import Recipe
from flows.reporting.terminal import console
from tasks.evaluate.config import REPORT
from tasks.evaluate.sets.set_registry import FOLDER
from tasks.lineage.journal import JOURNALS
from tasks.tracking import TrackingStore

if TYPE_CHECKING:
    from flows.graph.graph import Graph

JUDGED = ("pipeline", "evaluate", "retrain")  # flows that end with the gate


def run(
    flow: Annotated[str, Argument(metavar="FLOW", help=f"one of: {', '.join(FLOWS)}")],
    recipe: RecipeName,
    overrides: Overrides,
    gpus: Gpus,
    utilisation: Utilisation = None,
    dry_run: Annotated[
        bool,
        Option(
            "--dry-run",
            help="print the plan and stop; for train, try a step of each training stage too",
        ),
    ] = False,
    promote: Annotated[
        Literal["gate", "never"],
        Option(help="whether a better model becomes champion, or stays challenger"),
    ] = "gate",
) -> None:
    """Run a flow."""
    if flow not in FLOWS:
        raise InputError(f"unknown flow '{flow}'; there are: {', '.join(FLOWS)}")
    from flows.graph.graph import load_graph  # imports pyarrow, as the next ones do
    from flows.planning.run_plan import check_disk, rehearse_training
    from flows.reporting.results_table import print_results

    loaded, profile, graph = load_graph(recipe, overrides)
    if dry_run and flow == "retrain":
        _is_nothing_new(loaded, profile, graph, told=True)
    elif dry_run:
        recipes.plan(recipe, overrides, gpus, utilisation)
        for line in rehearse_training(loaded, profile, graph) if flow == "train" else ():
            console.print(line, soft_wrap=True)
    if dry_run:
        return
    graph.require_runnable(flow)
    if flow == "pipeline" and _is_everything_there(loaded, profile, graph):
        console.print(loaded.name, style="bold", end=": ")
        console.print("everything is there, nothing to do")
        print_results(loaded, graph, profile)
        return
    if flow != "retrain":  # that downloads a part; the stage itself looks at the disk
        check_disk(graph)
    elif _is_nothing_new(loaded, profile, graph):
        return
    from flows.graph.ephemeral_server import temporary_server  # starts processes: only for a run

    with temporary_server(profile.root):
        # the flow's module imports prefect, which reads its settings then
        module = "flows.retrain" if flow == "retrain" else "flows.pipeline"
        run_flow = getattr(importlib.import_module(module), flow)
        recipes.print_heading(loaded)
        judged = {"promote": promote} if flow in JUDGED else {}
        run_flow(recipe=recipe, overrides=overrides, **judged)
    if flow == "pipeline":
        print_results(loaded, graph, profile)


def score(
    models: Annotated[
        list[str],
        Argument(
            metavar="MODEL",
            help="a saved model's folder, WEIGHTS:ARCHITECTURE, open_clip:NAME/WEIGHTS, "
            "transformers:FOLDER, or models:/NAME@ALIAS of the registry; NAME=MODEL names it",
        ),
    ],
    overrides: Overrides,
    recipe: Annotated[
        str, Option(help="take the sets of this recipe, or file with [evaluate] alone")
    ] = "",
    sets: Annotated[
        str,
        Option(
            metavar="NAME,NAME",
            help="known sets, folders or paths of your own, NAME=FOLDER, or paper for all 33",
        ),
    ] = "",
    data: Annotated[str, Option(help="folder that holds them")] = FOLDER,
) -> None:
    """Evaluate any models on any sets, side by side."""
    names = tuple(filter(None, sets.split(",")))
    root = load_profile().root
    from flows.graph.ephemeral_server import temporary_server  # starts processes: only for a run
    from flows.graph.score_request import read_asked  # imports torch
    from flows.reporting.results_table import print_figures

    read_asked(models, recipe, names, data, overrides, root.resolve())
    with temporary_server(root):
        from flows.score import score as run_flow  # imports prefect, which reads its settings then

        made = run_flow(models, recipe, names, data, tuple(overrides))
    print_figures(made.folder)
    console.print(f"report    {made.folder / REPORT}")


def _is_nothing_new(recipe: Recipe, profile: Profile, graph: Graph, told: bool = False) -> bool:
    """Return whether nothing is new or waits from last time; say so, or if `told` what there is."""
    if recipe.demo and not (graph.site.demo and graph.site.demo.is_finished):
        return False  # its metadata is made first
    from flows.graph.incremental import describe_new_data, find_new_data  # imports duckdb
    from tasks.register.promotion import is_unsettled  # imports mlflow

    store = TrackingStore.at(profile.mlflow_uri, recipe.name)
    news = find_new_data(recipe, graph, store, keep_rejected=False)
    folder = news.last.registered.folder if news.last else None
    is_settled = folder is None or not is_unsettled(store, recipe.registry, folder)
    if told or (news.is_nothing and is_settled):
        console.print("\n".join(describe_new_data(news, recipe)), soft_wrap=True)
    return news.is_nothing and is_settled


def _is_everything_there(recipe: Recipe, profile: Profile, graph: Graph) -> bool:
    """Return whether all is made, still registered and settled, and no killed run is unfinished."""
    if not graph.is_finished:
        return False
    from tasks.lineage.mlflow_store import Tracking  # imports mlflow, as the next one does
    from tasks.register.model_registry import forget_if_gone
    from tasks.register.promotion import is_unsettled

    store = TrackingStore.at(profile.mlflow_uri, recipe.name)
    forget_if_gone(graph.register.address, store)
    if not graph.is_finished or is_unsettled(store, recipe.registry, graph.register.folder):
        return False
    tracking = Tracking(store, profile.root.resolve() / JOURNALS)
    return not tracking.has_unfinished(recipe.digest)
