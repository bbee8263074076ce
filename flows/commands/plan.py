"""`plan RECIPE`: what a run would do, what is there already, and what it costs.

Covers: the arguments and printing.
Not here: the plan (flows/planning/run_plan.py) and the estimates (flows/planning/data_cost.py,
training_estimate.py).
"""

from __future__ import annotations

import argparse

from rich.table import Table

from evaclip_model.errors import InputError
from flows.commands.recipe_arguments import with_gpus, with_recipe
from flows.config.gpu_spec import Machines
from flows.console.terminal import console
from flows.graph.graph import load_chart
from flows.planning.data_cost import estimate_table, is_large
from flows.planning.feasibility import Machine, recipe_findings, sentence
from flows.planning.run_plan import make_plan
from flows.planning.training_cost import engine_settings, training_table

HELP = "what a run would do, what is already there, what it costs, and whether it fits here"


def arguments(parser: argparse.ArgumentParser) -> None:
    with_recipe(parser)
    with_gpus(parser)


def run(parsed: argparse.Namespace) -> None:
    recipe, profile, chart = load_chart(parsed.recipe, parsed.overrides)
    published = [recipe.published.gpus] if recipe.published.gpus else []
    lists = [Machines.parse(text) for text in parsed.gpus or published]
    share = parsed.utilisation
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
    machine = Machine.here(profile.root.resolve())
    for given in map(Machines.parse, parsed.gpus) if parsed.gpus else [None]:
        fits = sentence(recipe_findings(recipe, chart, profile, machine, given))
        on = f" with {given}" if given else ""
        console.print(f"[bold]fits{on}:[/] ", end="")
        console.print(fits, soft_wrap=True, markup=False)
