"""`show RECIPE`: every setting with its value."""

from __future__ import annotations

import argparse

from flows.commands.recipe_arguments import with_recipe
from flows.config.recipe import load_recipe
from flows.console.terminal import console

HELP = "a recipe, resolved: every setting with its value"
arguments = with_recipe


def run(parsed: argparse.Namespace) -> None:
    console.file.write(load_recipe(parsed.recipe, parsed.overrides).to_json())
