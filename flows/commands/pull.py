"""`pull MODEL FOLDER`: a registered model as a folder for `evaclip`."""

from __future__ import annotations

import argparse
from pathlib import Path

from flows.profile import load_profile
from flows.terminal import console

HELP = "fetch a registered model as a folder for `evaclip`"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="NAME@ALIAS or NAME/VERSION")
    parser.add_argument("folder", type=Path, help="where to put it; must not exist yet")


def run(parsed: argparse.Namespace) -> None:
    from tasks.register.pull import pull  # imports mlflow

    profile = load_profile()
    folder = pull(profile.mlflow_uri, parsed.model, parsed.folder)
    console.print(
        f"{parsed.model} is in {folder}; try: evaclip classify IMAGE LABEL… --model {folder}"
    )
