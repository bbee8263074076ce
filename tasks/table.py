"""Tables: one model, a writer of it for Markdown and one for a terminal.

Not here: HTML (tasks/evaluate/report/macros.html.j2).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from evaclip_model.errors import escape_control

if TYPE_CHECKING:
    from jinja2 import Template
    from rich.table import Table as RichTable

NOTHING = "–"
"""Stands in place of a missing number."""


@dataclass(frozen=True)
class Cell:
    text: str
    emphasis: str = ""
    """CSS class of the page: value, good, bad, quiet, warned, code."""
    link: str = ""
    """Anchor on the page, without its #."""
    url: str = ""
    """Address elsewhere."""
    drawing: Markup | None = None
    """Shown by the page instead of the text."""
    share: float | None = None
    """Drawn as a bar behind the text on the page, from 0 to 1."""
    notes: tuple[int, ...] = ()
    """Numbers of footnotes."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", escape_control(self.text))


@dataclass(frozen=True)
class TableRow:
    """One row; a style of "group" is a heading across the table, "ours" is emphasised."""

    cells: tuple[Cell, ...]
    style: str = ""


@dataclass(frozen=True)
class TableColumn:
    """A column of numbers, set right, unless it has words; only the page has one of drawings."""

    title: str
    has_words: bool = False
    is_drawn: bool = False


def words(title: str) -> TableColumn:
    """A column of words, set left; the first column always is one."""
    return TableColumn(title, has_words=True)


@dataclass
class Table:
    """A table whose first column names the row."""

    columns: tuple[TableColumn, ...]
    rows: list[TableRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Footnotes in the order in which they are first needed, each text once."""
    is_upright: bool = False
    """True: the page sets the head upright, because there are many columns."""

    @classmethod
    def of(cls, *columns: TableColumn | str, is_upright: bool = False) -> Table:
        """A table without rows; a column that is given by its title alone is one of numbers."""
        made = [one if isinstance(one, TableColumn) else TableColumn(one) for one in columns]
        return cls((words(made[0].title), *made[1:]), is_upright=is_upright)

    def __bool__(self) -> bool:
        return bool(self.rows)

    def add(self, *cells: Cell | str | None, style: str = "") -> None:
        """Add a row; a plain text is a cell without emphasis, None one that says nothing."""
        made = [one if isinstance(one, Cell) else Cell(one or "") for one in cells]
        self.rows.append(TableRow(tuple(made), style))

    def find_shown(self, *, with_drawings: bool = False) -> list[int]:
        """Places of the columns that say something in some row; the first always is one."""
        rows = [row.cells for row in self.rows if row.style != "group"]
        return [
            place
            for place, column in enumerate(self.columns)
            if not place
            or any(
                cells[place].drawing and with_drawings
                if column.is_drawn
                else cells[place].text not in ("", NOTHING)
                for cells in rows
            )
        ]

    def cite(self, texts: Iterable[str]) -> tuple[int, ...]:
        """Numbers, from 1, of the footnotes with these texts, which are added where missing."""
        given = list(texts)
        self.notes += [text for text in dict.fromkeys(given) if text not in self.notes]
        return tuple(sorted(self.notes.index(text) + 1 for text in given))


def markdown_table(table: Table) -> str:
    """The table in Markdown, its footnotes below it."""
    shown = table.find_shown()
    return _markdown_template().render(table=table, shown=shown, escape=escape_markdown).rstrip()


@cache
def _markdown_template() -> Template:
    from jinja2 import Environment, StrictUndefined  # only where a page is made

    strict = Environment(undefined=StrictUndefined, trim_blocks=True)
    return strict.from_string(Path(__file__).with_name("table.md.j2").read_text())


def escape_markdown(text: str) -> str:
    """Text that Markdown and the HTML in it leave as it is, on one line."""
    return re.sub(r"[\\`*_\[\]|]", r"\\\g<0>", " ".join(text.split())).replace("<", "&lt;")


def terminal_table(table: Table) -> RichTable:
    """The table for a terminal, without footnotes."""
    from rich.table import Table as RichTable  # only where something is printed
    from rich.text import Text

    made = RichTable(box=None, pad_edge=False)
    shown = table.find_shown()
    for place in shown:
        column = table.columns[place]
        made.add_column(Text(column.title), justify="left" if column.has_words else "right")
    for row in table.rows:
        made.add_row(*(Text(row.cells[place].text) for place in shown if place < len(row.cells)))
    return made
