"""Arguments that several commands share: which recipe, with which changes, on which GPUs.

Covers: adding them to a parser.
Not here: what they mean (flows/config/recipe_loader.py, flows/config/gpu_spec.py).
"""

from __future__ import annotations

import argparse


def with_recipe(parser: argparse.ArgumentParser) -> None:
    """`RECIPE` and `--set table.key=value`."""
    parser.add_argument("recipe", help="name of a recipe, or path of a .toml file")
    with_overrides(parser)


def with_overrides(parser: argparse.ArgumentParser) -> None:
    """`--set table.key=value`."""
    parser.add_argument(
        *("--set", "-s"),
        dest="overrides",
        metavar="table.key=value",
        action="append",
        default=[],
        help="change one setting of the recipe; may be given again",
    )


def with_gpus(parser: argparse.ArgumentParser) -> None:
    """`--gpus` and `--utilisation`."""
    parser.add_argument(
        "--gpus",
        action="append",
        metavar="16xA100-40GB@2.5",
        help="plan training on these GPUs, @ the price of one's hour; may be given again "
        "(the recipe's published ones)",
    )
    parser.add_argument(
        "--utilisation",
        type=float,
        metavar="SHARE",
        help="share of the GPUs' peak that you expect, recomputed FLOPs counted too (what the "
        "paper's Table 6 reached)",
    )
