"""`sources inspect PATH`: what metadata files hold, before they become a source."""

from __future__ import annotations

import argparse

from flows.console.terminal import console

HELP = "what metadata files hold, before they become a source"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["inspect"])
    parser.add_argument("files", metavar="PATH", help="a file, a glob, or a URL with wildcards")
    parser.add_argument(
        "--read", type=int, default=4, help="files to read for shares and histograms (4)"
    )


def run(parsed: argparse.Namespace) -> None:
    from flows.audit.metadata_table import inspect_sources  # imports duckdb

    inspect_sources(parsed.files, parsed.read, console)
