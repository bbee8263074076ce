"""The terminal a person watches: one console for everything the command line prints."""

from __future__ import annotations

import sys

from rich.console import Console

LOG_WIDTH = 120
"""Columns where nobody's window decides: a file, a pipe, CI."""

console = Console(highlight=False, width=None if sys.stdout.isatty() else LOG_WIDTH)
