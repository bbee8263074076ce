"""`run FLOW RECIPE` and `score MODEL...`: run a flow, or only say what it would do; then the
figures of what it made, and the commands that come next.

prefect is imported only when a flow runs, behind a Prefect server for that time.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Option

from evaclip_model.errors import InputError
from evaclip_model.ports import find_free_port
from flows.commands import recipes
from flows.commands.recipes import FLOWS, Gpus, Overrides, RecipeName, Utilisation
from flows.config.profile import Profile, load_profile
from flows.config.recipe import Recipe
from flows.reporting.terminal import console
from tasks.evaluate.config import REPORT, RESULTS
from tasks.evaluate.sets.set_registry import FOLDER
from tasks.lineage.journal import JOURNALS
from tasks.process.child import start_supervised
from tasks.register.model_versions import RegisteredVersion
from tasks.register.promotion import read_decision
from tasks.table import NOTHING, Table, terminal_table, words
from tasks.tracking import TrackingStore

if TYPE_CHECKING:
    from flows.graph.graph import Graph
    from tasks.evaluate.report.findings import Findings


JUDGED = ("pipeline", "evaluate", "retrain")  # flows that end with the gate
START_TIMEOUT_S = 120
BRIEF_EVENTS = '{"prefect.flow-run.heartbeat": 3600, "prefect.artifact.updated": 3600}'
"""Seconds for which the server keeps what a run says every minute, instead of a week."""
ROWS_IN_FULL = 24
"""Up to so many figures all are printed; beyond, the paper's metric of every set."""


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

    with temporary_server(profile.root):
        from flows import pipeline  # imports prefect, which reads its settings then

        run_flow = getattr(pipeline, flow)
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
    from flows.graph.score_request import read_asked  # imports torch

    read_asked(models, recipe, names, data, overrides, root.resolve())
    with temporary_server(root):
        from flows import pipeline  # imports prefect, which reads its settings then

        made = pipeline.score(models, recipe, names, data, tuple(overrides))
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


@contextmanager
def temporary_server(root: Path) -> Iterator[None]:
    """Serve the Prefect API, unless PREFECT_API_URL names a server. Enter it before prefect is
    imported, which reads its settings then."""
    quiet = {
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # infra/automations.yaml counts on it
        "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500,504",  # a server under load says so for a moment
        "PREFECT_HOME": str((root / "prefect").resolve()),
        "PREFECT_SERVER_SERVICES_DB_VACUUM_EVENT_RETENTION_OVERRIDES": BRIEF_EVENTS,
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    if os.environ.get("PREFECT_API_URL"):
        yield
        return
    port, secret = find_free_port(), f"evaclip:{secrets.token_urlsafe(32)}"
    log = root / "prefect" / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"),
        *("--host", "127.0.0.1", "--port", str(port), "--log-level", "error"),
    ]
    address = f"http://127.0.0.1:{port}/api"
    settings = {
        **os.environ,
        "PREFECT_UI_ENABLED": "0",
        "PREFECT__SERVER_EPHEMERAL": "1",
        # A web page or another user of this machine reaches loopback, too.
        "PREFECT_SERVER_API_AUTH_STRING": secret,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": address.removesuffix("/api"),
    }
    with start_supervised(command, log=log, grace_s=5, env=settings) as process:
        _wait_until_healthy(f"{address}/health", process, log)
        mine = {"PREFECT_API_URL": address, "PREFECT_API_AUTH_STRING": secret}
        before = {name: os.environ[name] for name in mine if name in os.environ}
        os.environ.update(mine)
        try:
            yield
        finally:
            for name in mine:
                del os.environ[name]
            os.environ.update(before)


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.1)
    failed = "ended" if process.poll() is not None else f"gave no answer in {START_TIMEOUT_S} s"
    raise InputError(f"the temporary Prefect server {failed} while it started: {log} says why")


def read_findings(folder: Path) -> Findings:
    from tasks.evaluate.report.findings import Findings  # imports torch, which `plan` need not

    return Findings(json.loads((folder / RESULTS).read_text()))


def figures_table(found: Findings) -> Table:
    """The figures of any number of sets and models, averages last."""
    is_short = sum(len(found.list_metrics(one)) for one in found.sets) <= ROWS_IN_FULL
    table = Table.of("set", words("metric"), *found.models, "published", "chance")
    for evalset in found.sets:
        for metric in found.list_metrics(evalset) if is_short else found.headline_metrics(evalset):
            figures = [found.get_figure(evalset, model, metric) for model in found.models]
            beside = figures[0].paper.get("published"), figures[0].chance
            shares = [*(one.value for one in figures), *beside]
            table.add(evalset, metric, *map(_format_percent, shares))
    for key in found.raw.get("averages", {}):
        averages = [found.table_average(key, model) for model in found.models]
        points = [one["value"] for one in averages]
        points.append(None if points[0] is None else averages[0]["intersection_reference"])
        shares = [None if one is None else one / 100 for one in points]
        table.add(f"Table {key}", "average", *map(_format_percent, shares), NOTHING)
    return table


def print_figures(evaluation: Path) -> None:
    console.print(terminal_table(figures_table(read_findings(evaluation))))


def print_results(recipe: Recipe, graph: Graph, profile: Profile) -> None:
    """Print the figures, where everything lies, and the commands that come next."""
    version = RegisteredVersion.from_registration(graph.register.folder)
    aliases = version.current_aliases() or ()
    wanted = recipe.registry.alias  # the one in use, where the gate gave it to this version
    name = f"{version.name}@{wanted}" if wanted in aliases else str(version)
    console.print()
    print_figures(graph.evaluate.folder)
    named = "".join(f" @{alias}" for alias in aliases)
    for line in (
        f"\nreport    {graph.evaluate.folder / REPORT}",
        f"registry  {version}{named} in {profile.mlflow_uri}",
        f"gate      {read_decision(graph.register.folder).summary}",
        f"next      python -m flows pull {name} my-model",
        '          evaclip classify IMAGE "a red apple" "a dog" --model my-model',
    ):
        console.print(line, soft_wrap=True)


def _format_percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.2f} %"
