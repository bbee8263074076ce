"""Tables that are the same on the page and in Markdown.

Covers: cells, rows, footnotes; a table as Markdown.
Not here: what stands in any table; a table as HTML (table.html.j2).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup


@dataclass(frozen=True)
class Cell:
    """One cell; `style` is a CSS class of the page."""

    text: str
    style: str = ""
    link: str = ""
    """Anchor on the page, without its #."""
    drawing: Markup | None = None
    """What the page shows instead of the text."""
    share: float | None = None
    """Drawn as a bar behind the text on the page, from 0 to 1."""
    notes: tuple[int, ...] = ()
    """Numbers of footnotes."""


@dataclass(frozen=True)
class Row:
    """One row; a `style` of "group" is a heading across the table."""

    cells: tuple[Cell, ...]
    style: str = ""


@dataclass(frozen=True)
class Table:
    """A table: its first column names the row."""

    head: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    text_columns: frozenset[int] = frozenset()
    """Columns of words, which are set left; the first always is."""
    page_columns: frozenset[int] = frozenset()
    """Columns that only the page has, because they are drawn."""
    narrow: bool = False
    """Whether the head is set upright, because there are many columns."""


@dataclass
class Footnotes:
    """Numbers footnotes in the order in which they are first needed, each text once."""

    texts: list[str] = field(default_factory=list)

    def number(self, text: str) -> int:
        """Number of the footnote with this text, from 1."""
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1

    def numbers(self, texts: Iterable[str]) -> tuple[int, ...]:
        """Numbers of several footnotes."""
        return tuple(sorted(self.number(text) for text in texts))


def row(*cells: Cell | str, style: str = "") -> Row:
    """A row of cells; a plain text is a cell without style."""
    return Row(tuple(Cell(one) if isinstance(one, str) else one for one in cells), style)


def markdown_of(table: Table) -> str:
    """The table in Markdown, its footnotes below it; numbers set right."""
    shown = [index for index in range(len(table.head)) if index not in table.page_columns]
    left = {0, *table.text_columns}
    lines = [
        _line([escaped(table.head[index]) for index in shown]),
        _line([":--" if index in left else "--:" for index in shown]),
    ]
    for one in table.rows:
        if one.style == "group":
            lines.append(_line([f"**{escaped(one.cells[0].text)}**", *[""] * (len(shown) - 1)]))
        else:
            lines.append(_line([_markdown_cell(one.cells[i], one.style) for i in shown]))
    notes = [f"{number}. {escaped(text)}" for number, text in enumerate(table.notes, 1)]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def escaped(text: str) -> str:
    """Text that Markdown and the HTML in it leave as it is, on one line."""
    flat = " ".join(text.split())
    for mark in "\\`*_[]|<":
        flat = flat.replace(mark, "&lt;" if mark == "<" else f"\\{mark}")
    return flat


def _markdown_cell(cell: Cell, style: str) -> str:
    text = escaped(cell.text)
    if style == "ours" and text:
        text = f"**{text}**"
    return text + "".join(f"<sup>{number}</sup>" for number in cell.notes)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
