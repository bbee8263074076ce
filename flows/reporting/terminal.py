"""Printing on the command line: one console, one bar, one way to put totals into a line."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from evaclip_model.errors import escape_control
from tasks.progress import Report

LINE_EVERY_S = 20.0
SHOWN_COUNTS = 3
LOG_WIDTH = 120
"""Columns where nobody's window decides: a file, a pipe, CI."""


class PlainConsole(Console):
    """Prints text of others as it is, without its control characters: a path or a caption may look
    like rich's markup."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(escape_control(text), **options)


console = PlainConsole(width=None if sys.stdout.isatty() else LOG_WIDTH)


@contextmanager
def moving_bar(title: str) -> Iterator[Report]:
    """Show long work under way, as a bar or, where nobody watches, a line now and then."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<16}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[detail]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        row = bar.add_task(escape_control(title), total=None, detail="")
        last_line = time.monotonic()

        def report(done: float, total: float, detail: str = "") -> None:
            nonlocal last_line
            shown = escape_control(detail)
            bar.update(row, completed=done, total=total or None, detail=shown)
            if not console.is_terminal and time.monotonic() - last_line > LINE_EVERY_S:
                last_line = time.monotonic()
                console.print(f"  {title}: {done:,.0f} of {total:,.0f} {detail}")

        yield report


def summarise_counts(counts: Mapping[str, int | float]) -> str:
    """The first totals of an artifact, for a line of text: stages name the telling ones first."""
    return ", ".join(
        f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value:,}"
        for name, value in islice(counts.items(), SHOWN_COUNTS)
    )
