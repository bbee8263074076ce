"""`trace`: where one sample came from, where it is, what was made of it."""

from __future__ import annotations

import argparse

from evaclip_model.errors import InputError
from flows.config.profile import load_profile
from flows.console.terminal import console

HELP = "where one sample came from, where it is, what was made of it"


def arguments(parser: argparse.ArgumentParser) -> None:
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--url", help="address of the image; http or https does not matter")
    asked.add_argument("--uid", help="the sample's uid, as shards and the index have it")
    asked.add_argument("--sha256", help="of the image file, as downloaded or as stored")


def run(parsed: argparse.Namespace) -> None:
    from flows.audit.sample_trace import describe, trace  # imports duckdb

    root = load_profile().root.resolve()
    found = trace(url=parsed.url, uid=parsed.uid, sha256=parsed.sha256, root=root)
    for number, one in enumerate(found):
        lines = [*([""] if number else []), *describe(one, root)]
        console.print("\n".join(lines), soft_wrap=True, markup=False)
    if not found:
        raise InputError(f"no sample under {root} has that; what was never stored is not in shards")
