"""The templates of the reports, and the macros of theirs that Python calls.

In `*.html.j2` texts are escaped; numbers with a fraction are written with one decimal.
"""

from pathlib import Path
from typing import Any

import jinja2

from tasks.evaluate.report.numbers import format_plural, format_short, format_signed
from tasks.table import Table, escape_markdown, markdown_table


def titled_table(table: Table, title: str) -> str:
    """A table in Markdown below its title, after a blank line; nothing where it has no rows."""
    return f"\n\n{title}\n\n{markdown_table(table)}" if table else ""


TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=jinja2.select_autoescape(["html.j2"]),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=lambda value: f"{value:.1f}" if isinstance(value, float) else value,
)
TEMPLATES.filters |= {
    "plural": format_plural,
    "short": format_short,
    "signed": format_signed,
    "md": escape_markdown,
    "titled": titled_table,
    "table": markdown_table,
}
MACROS: Any = TEMPLATES.get_template("macros.html.j2").module
