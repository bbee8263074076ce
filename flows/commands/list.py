"""`list`: the flows and the recipes there are."""

from __future__ import annotations

import argparse

from flows.commands.run import FLOWS
from flows.config.recipe import load_recipe
from flows.config.recipe_loader import recipe_names
from flows.console.terminal import console

HELP = "the flows and the recipes there are"


def arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(_: argparse.Namespace) -> None:
    for title, rows in (
        ("flows", FLOWS),
        ("recipes", {name: load_recipe(name).title for name in recipe_names()}),
    ):
        console.print(f"[bold]{title}[/]")
        for name, text in rows.items():
            console.print(f"  {name:<23} {text}")
