"""`python -m flows sources inspect PATH`: what metadata files hold, before they become a source.

Covers: the command's output.
Not here: reading the files (tasks.merge.inspect_metadata).
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tasks.merge.inspect_metadata import Inspection, inspect_files

BARS = " ▁▂▃▄▅▆▇█"


def inspect_sources(pattern: str, read_files: int, console: Console) -> None:
    """Print what the files of `pattern` hold.

    Raises:
        InputError: nothing matches, a file cannot be read, or the collection is withdrawn.
    """
    print_inspection(pattern, inspect_files(pattern, read_files), console)


def print_inspection(pattern: str, found: Inspection, console: Console) -> None:
    """Print an inspection as a table."""
    rows = "" if found.rows is None else f", {found.rows:,} rows"
    console.print(f"[bold]{escape(pattern)}[/]: {found.files:,} files{rows}")
    console.print(f"columns over {found.read_rows:,} rows of {found.read_files} files:")
    table = Table("column", "type", "plays", "missing", "0 … 1", box=None, pad_edge=False)
    for column in found.columns:
        table.add_row(
            escape(column.name),
            escape(column.kind),
            column.part or "",
            f"{column.null_share:.1%}",
            bars(column.histogram),
        )
    console.print(table)
    console.print(f"[yellow]{escape(found.problem)}[/]" if found.problem else "fit for a source")


def bars(histogram: Sequence[int]) -> str:
    """A histogram as one block a bin; a bin that is not empty is never blank."""
    most = max(histogram, default=0)
    if most == 0:
        return ""
    return "".join(BARS[-(-count * (len(BARS) - 1) // most)] for count in histogram)
