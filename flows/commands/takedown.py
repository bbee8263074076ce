"""`takedown FILE`: new dataset versions without some samples, and the models they are in."""

from __future__ import annotations

import argparse
from pathlib import Path

from flows.config.profile import load_profile
from flows.console.terminal import console

HELP = "new dataset versions without some samples, and the models they are in"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="URLs, uids or SHA-256s, one a line")


def run(parsed: argparse.Namespace) -> None:
    from flows.audit.dataset_replacement import describe, take_down  # imports duckdb

    root = load_profile().root.resolve()
    done = take_down(parsed.file, root)
    for one in done:
        console.print("\n".join(describe(one, root)), soft_wrap=True, markup=False)
    if not done:
        console.print(f"no dataset version under {root} holds any of these samples")
        return
    console.print(
        f'the next run leaves them out with `takedowns = ["{parsed.file}"]` in the table '
        "\\[dataset] of the recipe",
        soft_wrap=True,
    )
