"""What the command line prints with: one console, one way to put totals into a line."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from rich.console import Console

SHOWN_COUNTS = 3
LOG_WIDTH = 120
"""Columns where nobody's window decides: a file, a pipe, CI."""

console = Console(highlight=False, width=None if sys.stdout.isatty() else LOG_WIDTH)


def summarise(counts: Mapping[str, int | float]) -> str:
    """The first totals of an artifact, for a line of text: stages name the telling ones first."""
    shown = list(counts.items())[:SHOWN_COUNTS]
    return ", ".join(
        f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value:,}"
        for name, value in shown
    )
