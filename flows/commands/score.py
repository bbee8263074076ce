"""`score MODEL...`: evaluate any models on any sets, side by side.

Covers: the arguments, a Prefect server for the time of the run, the figures as a table.
Not here: the flow (flows/score.py), the reports.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.table import Table

from flows.profile import load_profile
from flows.terminal import console
from tasks.evaluate.config import REPORT, RESULTS
from tasks.evaluate.registry import FOLDER

HELP = "evaluate any models on any sets, side by side"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="a saved model's folder, WEIGHTS:ARCHITECTURE, open_clip:NAME/WEIGHTS, or "
        "models:/NAME@ALIAS of the registry; NAME=MODEL names it",
    )
    parser.add_argument("--recipe", default="", help="take the sets of this recipe")
    parser.add_argument(
        "--sets", default="", metavar="NAME,NAME", help="known sets, or folders of your own"
    )
    parser.add_argument("--data", default=FOLDER, help=f"folder that holds them ({FOLDER})")
    parser.add_argument(
        *("--set", "-s"),
        dest="overrides",
        metavar="table.key=value",
        action="append",
        default=[],
        help="change one setting of the recipe; may be given again",
    )


def run(parsed: argparse.Namespace) -> None:
    asked = {
        "models": parsed.models,
        "recipe": parsed.recipe,
        "sets": tuple(filter(None, parsed.sets.split(","))),
        "data": parsed.data,
        "overrides": tuple(parsed.overrides),
    }
    root = load_profile().root
    from flows.scoring import read_asked  # imports torch
    from flows.server import temporary_server  # starts processes: only for a run

    read_asked(**asked, root=root.resolve())
    with temporary_server(root):
        from flows.score import score  # imports prefect, which reads its settings then

        made = score(**asked)
    console.print(figures_table(made.folder))
    console.print(f"report    {made.folder / REPORT}")


def figures_table(folder: Path) -> Table:
    """Every figure of every model beside chance, as the evaluation in `folder` found them."""
    results = json.loads((folder / RESULTS).read_text())
    models = list(results["models"])
    table = Table("set", "metric", *models, "chance", box=None, pad_edge=False)
    for name, chance in results["chance"].items():
        by_model = results["results"][name]
        for metric, value in chance.items():
            shares = [by_model[model][metric] for model in models]
            table.add_row(name, metric, *(f"{100 * one:.2f} %" for one in (*shares, value)))
    return table
