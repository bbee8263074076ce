"""Commands about recipes, before anything runs, and the arguments that several commands share. Not
here: the plan (flows/planning/run_plan.py), estimates (flows/planning/recipe_cost.py), checks
(flows/planning/health_checks.py)."""

import itertools
from typing import Annotated

from rich.table import Table
from rich.text import Text
from typer import Argument, Exit, Option

from evaclip_model.errors import InputError
from flows.config.profile import load_profile
from flows.config.recipe import Machines, Recipe, load_recipe, planned_stages
from flows.config.recipe_loader import recipe_names
from flows.reporting.terminal import console

RecipeName = Annotated[
    str, Argument(metavar="RECIPE", help="name of a recipe, or path of a .toml file")
]
Overrides = Annotated[
    list[str],
    Option(
        *("--set", "-s"),
        metavar="table.key=value",
        default_factory=list,
        show_default=False,
        help="change one setting of the recipe; may be given again",
    ),
]
Gpus = Annotated[
    list[str],
    Option(
        metavar="16xA100-40GB@2.5",
        default_factory=list,
        show_default=False,
        help="plan training on these GPUs, @ the price of one's hour; may be given again "
        "(the recipe's published ones)",
    ),
]
Utilisation = Annotated[
    float | None,
    Option(
        metavar="SHARE",
        help="share of the GPUs' peak that you expect, recomputed FLOPs counted too (what the "
        "paper's Table 6 reached)",
    ),
]
FLOWS = {
    "pipeline": "metadata to registered model: prepare, train, evaluate, register",
    "prepare": "metadata to a dataset version: merge, download, verify, dataset",
    "train": "a dataset version to a model: initialise, then every training stage",
    "evaluate": "a trained model to its report and its registry entry: evaluate, register",
    "retrain": "what is new since the last model: merge, download, train on, compare, judge",
}
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def list_recipes() -> None:
    """List the flows and the recipes there are."""
    for title, rows in (
        ("flows", FLOWS),
        ("recipes", {name: load_recipe(name).title for name in recipe_names()}),
    ):
        console.print(title, style="bold")
        for name, text in rows.items():
            console.print(f"  {name:<23} {text}")


def show(recipe: RecipeName, overrides: Overrides) -> None:
    """Show a recipe, resolved: every setting with its value."""
    console.file.write(load_recipe(recipe, overrides).to_json())


def plan(
    recipe: RecipeName,
    overrides: Overrides,
    gpus: Gpus,
    utilisation: Utilisation = None,
    machines: Annotated[
        str,
        Option(
            metavar="50x64@2.7",
            help="plan data stages on so many machines, of so many cores, @ the price of an hour",
        ),
    ] = "1x64",
) -> None:
    """Say what a run would do, what is already there, what it costs, and whether it fits here."""
    from flows.graph.graph import load_graph  # imports pyarrow, as the next ones do
    from flows.planning import recipe_cost
    from flows.planning.run_plan import Machine, make_plan, recipe_findings, summarise_findings

    loaded, profile, graph = load_graph(recipe, overrides)
    published = [loaded.published.gpus] if loaded.published.gpus else []
    if utilisation is not None and not 0 < utilisation <= 1:
        raise InputError(f"--utilisation {utilisation:g}: expected a share above 0, at most 1")
    workers = recipe_cost.Workers.parse_spec(machines)
    table = Table("stage", "state", "what", "digest", box=None, pad_edge=False)
    for row in make_plan(graph):
        colour = {"there": "green", "unfinished": "yellow", "to make": "white"}[row.state]
        table.add_row(row.title, Text(row.state, style=colour), row.size, row.digest)
    print_heading(loaded)
    console.print(table)
    for absent in (one for step in graph.steps for one in step.absent):
        console.print(f"not here: {absent}", soft_wrap=True)
    if recipe_cost.is_large(loaded):
        data = recipe_cost.estimate_data(loaded)
        console.print(recipe_cost.estimate_table("estimate", data))
        console.print(recipe_cost.data_table(loaded, workers))
    for these in map(Machines.parse_spec, gpus or published):
        console.print(recipe_cost.training_table(loaded, these, utilisation))
        for train in planned_stages(loaded):
            if settings := recipe_cost.engine_settings(loaded, train, these):
                text = f"DeepSpeed for {train.name} on {these}: {settings}"
                console.print(text, soft_wrap=True)
    if (top1 := loaded.published.imagenet_top1) is not None:
        console.print(f"published: {top1:g} % top-1 on ImageNet-1K, zero-shot")
    root = profile.root_url or profile.root.resolve()
    console.print(f"artifacts in {root}, tracking at {profile.mlflow_uri}")
    machine = Machine.this_machine(profile.root.resolve())
    for given in map(Machines.parse_spec, gpus) if gpus else [None]:
        fits = summarise_findings(recipe_findings(loaded, graph, profile, machine, given))
        console.print(f"fits with {given}:" if given else "fits:", style="bold", end=" ")
        console.print(fits, soft_wrap=True)


def doctor(
    recipe: Annotated[
        str | None, Option(help="what this recipe needs too: its name or .toml file")
    ] = None,
) -> None:
    """Check that this machine is ready: versions, disk, stores, servers, GPUs; say what to do."""
    from flows.graph.graph import load_graph  # imports pyarrow, as the next ones do
    from flows.planning.health_checks import check_weights, examine_machine
    from flows.planning.run_plan import Machine, recipe_findings

    findings = examine_machine(load_profile())
    if recipe:
        loaded, profile, graph = load_graph(recipe, ())
        machine = Machine.this_machine(profile.root.resolve())
        needs = recipe_findings(loaded, graph, profile, machine)
        findings = itertools.chain(findings, needs, check_weights(loaded))
    levels = []
    for finding in findings:
        levels.append(finding.level)
        console.print(f"{finding.level:4}", style=COLOURS[finding.level], end="  ")
        do = f" -> {finding.do}" if finding.do else ""
        console.print(f"{finding.what}: {finding.found}{do}", soft_wrap=True)
    failed, warned = levels.count("fail"), levels.count("warn")
    console.print(f"{len(levels)} checks: {failed} failed, {warned} with a warning")
    if failed:
        raise Exit(1)


def print_heading(recipe: Recipe) -> None:
    """Print a recipe's name, title and digest, above what is said of it."""
    console.print(recipe.name, style="bold", end="  ")
    console.print(f"{recipe.title}  ({recipe.digest})")
