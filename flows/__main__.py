"""The command line: `python -m flows list | show | plan | run | pull | trace | takedown`.

Covers: reading arguments, printing, exit codes (0 done, 2 a user's mistake, 130 interrupted).
Not here: any work; prefect is imported only when a flow runs.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from evaclip_model.errors import InputError
from flows.chart import Chart, load_chart
from flows.estimate import estimate_table, is_large
from flows.machines import Machines
from flows.plan import check_disk, make_plan
from flows.profile import Profile, load_profile
from flows.recipe import Recipe, load_recipe
from flows.recipe_file import recipe_names
from flows.results import print_results
from flows.terminal import console
from flows.training_estimate import engine_settings, training_table
from tasks.lineage.journal import JOURNALS
from tasks.tracking import TrackingStore

FLOWS = {
    "pipeline": "metadata to registered model: prepare, train, evaluate, register",
    "prepare": "metadata to a dataset version: merge, download, verify, dataset",
    "train": "a dataset version to a model: initialise, then every training stage",
    "evaluate": "a trained model to its report and its registry entry: evaluate, register",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parsed = _parser().parse_args(arguments)
    try:
        parsed.command(parsed)
    except InputError as error:
        console.file.flush()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flows", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, does: object, help_text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help_text, description=help_text)
        added.set_defaults(command=does)
        return added

    def with_recipe(added: argparse.ArgumentParser) -> None:
        added.add_argument("recipe", help="name of a recipe, or path of a .toml file")
        added.add_argument(
            *("--set", "-s"),
            dest="overrides",
            metavar="table.key=value",
            action="append",
            default=[],
            help="change one setting of the recipe; may be given again",
        )

    def with_gpus(added: argparse.ArgumentParser) -> None:
        added.add_argument(
            "--gpus",
            action="append",
            metavar="16xA100-40GB@2.5",
            help="plan training on these GPUs, @ the price of one's hour; may be given again "
            "(the recipe's published ones)",
        )
        added.add_argument(
            "--utilisation",
            type=float,
            metavar="SHARE",
            help="share of the GPUs' peak that you expect, recomputed FLOPs counted too (what the "
            "paper's Table 6 reached)",
        )

    command("list", _list, "the flows and the recipes there are")
    with_recipe(command("show", _show, "a recipe, resolved: every setting with its value"))
    plan = command("plan", _plan, "what a run would do, what is already there, and what it costs")
    with_recipe(plan)
    with_gpus(plan)
    run = command("run", _run, "run a flow")
    run.add_argument("flow", help=f"one of: {', '.join(FLOWS)}")
    with_recipe(run)
    dry_run = "print the plan and stop; for train, try a step of each training stage too"
    run.add_argument("--dry-run", action="store_true", help=dry_run)
    with_gpus(run)
    trace = command("trace", _trace, "where one sample came from, where it is, what was made of it")
    asked = trace.add_mutually_exclusive_group(required=True)
    asked.add_argument("--url", help="address of the image; http or https does not matter")
    asked.add_argument("--uid", help="the sample's uid, as shards and the index have it")
    asked.add_argument("--sha256", help="of the image file, as downloaded or as stored")
    takedown = command(
        "takedown",
        _takedown,
        "new dataset versions without some samples, and the models they are in",
    )
    takedown.add_argument("file", type=Path, help="URLs, uids or SHA-256s, one a line")
    inspect = command("sources", _sources, "what metadata files hold, before they become a source")
    inspect.add_argument("action", choices=["inspect"])
    inspect.add_argument("files", metavar="PATH", help="a file, a glob, or a URL with wildcards")
    inspect.add_argument(
        "--read", type=int, default=4, help="files to read for shares and histograms (4)"
    )
    pull = command("pull", _pull, "fetch a registered model as a folder for `evaclip`")
    pull.add_argument("model", help="NAME@ALIAS or NAME/VERSION")
    pull.add_argument("folder", type=Path, help="where to put it; must not exist yet")
    return parser


def _list(_: argparse.Namespace) -> None:
    for title, rows in (
        ("flows", FLOWS),
        ("recipes", {name: load_recipe(name).title for name in recipe_names()}),
    ):
        console.print(f"[bold]{title}[/]")
        for name, text in rows.items():
            console.print(f"  {name:<23} {text}")


def _show(arguments: argparse.Namespace) -> None:
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    console.file.write(recipe.to_json())


def _plan(arguments: argparse.Namespace) -> None:
    recipe, profile, chart = load_chart(arguments.recipe, arguments.overrides)
    published = [recipe.published.gpus] if recipe.published.gpus else []
    lists = [Machines.parse(text) for text in arguments.gpus or published]
    share = arguments.utilisation
    if share is not None and not 0 < share <= 1:
        raise InputError(f"--utilisation {share:g}: expected a share above 0, at most 1")
    table = Table("stage", "state", "what", "digest", box=None, pad_edge=False)
    for row in make_plan(recipe, chart):
        colour = {"there": "green", "unfinished": "yellow", "to make": "white"}[row.state]
        table.add_row(row.title, f"[{colour}]{row.state}[/]", row.size, row.digest)
    console.print(f"[bold]{recipe.name}[/]  {recipe.title}  ({recipe.digest})")
    console.print(table)
    for absent in chart.absent:
        console.print(f"not here: {absent.sentence}", soft_wrap=True, markup=False)
    if is_large(recipe):
        console.print(estimate_table(recipe))
    for machines in lists:
        console.print(training_table(recipe, machines, share))
        for train in recipe.train:
            settings = engine_settings(recipe, train, machines)
            if settings:
                text = f"DeepSpeed for {train.name} on {machines}: {settings}"
                console.print(text, soft_wrap=True, markup=False)
    console.print(f"artifacts in {profile.root.resolve()}, tracking at {profile.mlflow_uri}")


def _run(arguments: argparse.Namespace) -> None:
    if arguments.flow not in FLOWS:
        raise InputError(f"unknown flow '{arguments.flow}'; there are: {', '.join(FLOWS)}")
    if arguments.dry_run:
        _dry_run(arguments)
        return
    recipe, profile, chart = load_chart(arguments.recipe, arguments.overrides)
    chart.require(arguments.flow)
    if arguments.flow == "pipeline" and _nothing_to_do(recipe, profile, chart):
        console.print(f"[bold]{recipe.name}[/]: everything is there, nothing to do")
        print_results(recipe, chart, profile)
        return
    check_disk(recipe, chart, profile.root)
    from flows.server import temporary_server  # starts processes: only for a run

    with temporary_server(profile.root):
        # the flow's module imports prefect, which reads its settings then
        run = getattr(importlib.import_module(f"flows.{arguments.flow}"), arguments.flow)
        console.print(f"[bold]{recipe.name}[/]  {recipe.title}  ({recipe.digest})")
        run(recipe=arguments.recipe, overrides=arguments.overrides)
    if arguments.flow == "pipeline":
        print_results(recipe, chart, profile)


def _dry_run(arguments: argparse.Namespace) -> None:
    _plan(arguments)
    if arguments.flow == "train":
        from flows.rehearse import rehearse  # starts processes

        for line in rehearse(*load_chart(arguments.recipe, arguments.overrides)):
            console.print(line, soft_wrap=True, markup=False)


def _nothing_to_do(recipe: Recipe, profile: Profile, chart: Chart) -> bool:
    """Whether everything is made, still registered, and no killed run waits for its end."""
    if not chart.is_finished:
        return False
    from tasks.lineage.mlflow_store import Tracking  # imports mlflow, as the next one does
    from tasks.register.registry import forget_if_gone

    store = TrackingStore.at(profile.mlflow_uri, recipe.name)
    forget_if_gone(chart.register, store)
    tracking = Tracking(store, profile.root.resolve() / JOURNALS)
    return chart.is_finished and not tracking.has_unfinished(recipe.digest)


def _trace(arguments: argparse.Namespace) -> None:
    from flows.trace import describe, trace  # imports duckdb

    root = load_profile().root.resolve()
    found = trace(url=arguments.url, uid=arguments.uid, sha256=arguments.sha256, root=root)
    for number, one in enumerate(found):
        lines = [*([""] if number else []), *describe(one, root)]
        console.print("\n".join(lines), soft_wrap=True, markup=False)
    if not found:
        raise InputError(f"no sample under {root} has that; what was never stored is not in shards")


def _takedown(arguments: argparse.Namespace) -> None:
    from flows.takedown import describe, take_down  # imports duckdb

    root = load_profile().root.resolve()
    done = take_down(arguments.file, root)
    for one in done:
        console.print("\n".join(describe(one, root)), soft_wrap=True, markup=False)
    if not done:
        console.print(f"no dataset version under {root} holds any of these samples")
        return
    console.print(
        f'the next run leaves them out with `takedowns = ["{arguments.file}"]` in the table '
        "\\[dataset] of the recipe",
        soft_wrap=True,
    )


def _sources(arguments: argparse.Namespace) -> None:
    from flows.sources import inspect_sources  # imports duckdb

    inspect_sources(arguments.files, arguments.read, console)


def _pull(arguments: argparse.Namespace) -> None:
    from tasks.register.pull import pull  # imports mlflow

    profile = load_profile()
    folder = pull(profile.mlflow_uri, arguments.model, arguments.folder)
    console.print(
        f"{arguments.model} is in {folder}; try: evaclip classify IMAGE LABEL… --model {folder}"
    )


if __name__ == "__main__":
    sys.exit(main())
