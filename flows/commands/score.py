"""`score MODEL...`: evaluate any models on any sets, side by side.

Covers: the arguments, a Prefect server for the time of the run, the figures as a table.
Not here: the flow (flows/score.py), the reports.
"""

from __future__ import annotations

import argparse

from flows.commands.recipe_arguments import with_overrides
from flows.config.profile import load_profile
from flows.console.terminal import console
from flows.reporting.results_table import figures_table, read_findings
from tasks.evaluate.config import REPORT
from tasks.evaluate.sets.set_registry import FOLDER

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
        "--sets",
        default="",
        metavar="NAME,NAME",
        help="known sets, folders of your own, or paper for all 33",
    )
    parser.add_argument("--data", default=FOLDER, help=f"folder that holds them ({FOLDER})")
    with_overrides(parser)


def run(parsed: argparse.Namespace) -> None:
    asked = {
        "models": parsed.models,
        "recipe": parsed.recipe,
        "sets": tuple(filter(None, parsed.sets.split(","))),
        "data": parsed.data,
        "overrides": tuple(parsed.overrides),
    }
    root = load_profile().root
    from flows.graph.ephemeral_server import temporary_server  # starts processes: only for a run
    from flows.graph.score_request import read_asked  # imports torch

    read_asked(**asked, root=root.resolve())
    with temporary_server(root):
        from flows.score import score  # imports prefect, which reads its settings then

        made = score(**asked)
    console.print(figures_table(read_findings(made.folder)))
    console.print(f"report    {made.folder / REPORT}")
