"""`python -m flows sources inspect PATH`: what files hold, before they become a source.

Covers: the command's output, of metadata and of what can be adopted.
Not here: reading the files (tasks.merge.inspect_metadata, tasks.adopt.inspect_source).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evaclip_model.errors import InputError
from tasks.adopt.inspect_source import SourceInspection, inspect_source
from tasks.merge.inspect_metadata import Inspection, inspect_files
from tasks.merge.withdrawn import why_refused

BARS = " ▁▂▃▄▅▆▇█"


def inspect_sources(pattern: str, read_files: int, console: Console) -> None:
    """Print what the files of `pattern` hold.

    Raises:
        InputError: nothing matches, a file cannot be read, or the collection is withdrawn.
    """
    if (withdrawn := why_refused(pattern)) is not None:
        raise InputError(withdrawn)
    found = inspect_source(pattern, read_files)
    if found is None:
        print_inspection(pattern, inspect_files(pattern, read_files), console)
    else:
        print_adoptable(pattern, found, console)


def print_adoptable(pattern: str, found: SourceInspection, console: Console) -> None:
    """Print what an adopted source would take."""
    files = f"{found.read_files:,} of {found.files:,} files" if found.is_cut_short else "all files"
    console.print(f"[bold]{escape(pattern)}[/]: form '{found.form}', {found.files:,} files")
    console.print(f"{found.samples:,} images with captions in {files}")
    _print_left_out(found.left_out, found.first_left_out, console)
    console.print("fit for \\[\\[adopt.sources]]" if found.samples else "no image with a caption")


def _print_left_out(reasons: Counter[str], first: str, console: Console) -> None:
    for reason, count in reasons.most_common():
        console.print(f"{count:,} would be left out: {escape(reason)}")
    if first:
        console.print(f"the first is {escape(first)}", soft_wrap=True)


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
            draw_bars(column.histogram),
        )
    console.print(table)
    _print_left_out(found.bad_lines, found.first_bad_line, console)
    console.print(f"[yellow]{escape(found.problem)}[/]" if found.problem else "fit for a source")


def draw_bars(histogram: Sequence[int]) -> str:
    """A histogram as one block a bin; a bin that is not empty is never blank."""
    most = max(histogram, default=0)
    if most == 0:
        return ""
    return "".join(BARS[-(-count * (len(BARS) - 1) // most)] for count in histogram)
