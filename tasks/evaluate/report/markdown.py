"""The report of an evaluation as Markdown: for a pull request, a wiki, a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tasks.evaluate.metrics.scored import Scored
from tasks.evaluate.report import tables
from tasks.evaluate.report.curves import Curve
from tasks.evaluate.report.examples import taken_for
from tasks.evaluate.report.findings import Findings
from tasks.evaluate.report.numbers import format_plural
from tasks.evaluate.report.paper_form import paper_tables
from tasks.evaluate.report.summary import headline_tiles, summary_sentences
from tasks.table import Table, escape_markdown, markdown_table, words

CLASSES_SHOWN = 10
"""Weakest classes of a set; the page has all of them."""
CONFUSIONS_SHOWN = 5


def write_markdown(
    results: Mapping[str, Any],
    scored: Mapping[str, Mapping[str, Scored]],
    curves: Sequence[Curve],
) -> str:
    found = Findings(results)
    parts = [*_first_screen(found), *_paper_lines(found)]
    parts += _titled_table(
        "## Beside the other models", tables.comparison_table(found, headlines_only=True)
    )
    parts += _titled_table("## Seen in training?", tables.contamination_table(found))
    parts += _titled_table("## Training", _training_table(curves))
    parts.append("## Set by set")
    for key in found.sets:
        parts += _set_lines(found, key, scored.get(key, {}).get(found.subject))
    parts += _titled_table("## Where this comes from", tables.provenance_table(found))
    return "\n\n".join(parts) + "\n"


def write_short_markdown(results: Mapping[str, Any]) -> str:
    """Summary and figures at a glance: the text beside a flow run."""
    return "\n\n".join(_first_screen(Findings(results))) + "\n"


def _titled_table(title: str, table: Table) -> list[str]:
    """A table below its title; nothing where it has no rows."""
    return [title, markdown_table(table)] if table else []


def _first_screen(found: Findings) -> Iterator[str]:
    yield f"# {escape_markdown(found.title)}"
    yield "\n".join(f"- {escape_markdown(one)}" for one in summary_sentences(found))
    tiles = Table.of("headline", "value", words("beside"))
    for tile in headline_tiles(found):
        tiles.add(tile.of, tile.value, ", ".join(f"{name} {value}" for name, value in tile.facts))
    yield markdown_table(tiles)
    yield from _titled_table("## Sets that could not be evaluated", tables.failure_table(found))
    yield from _titled_table("## All sets at a glance", tables.glance_table(found))


def _paper_lines(found: Findings) -> Iterator[str]:
    yield from _titled_table("## Beside the paper", tables.verdict_table(found))
    forms = paper_tables(found)
    if forms:
        yield "## The paper's tables"
        yield "In percent; known errors of the paper corrected and footnoted; ours in bold."
    for one in forms:
        yield from _titled_table(f"### {escape_markdown(one.title)}", one.table)
    yield from _titled_table("### Averages", tables.average_table(found))


def _training_table(curves: Sequence[Curve]) -> Table:
    table = Table.of(*("stage", "pairs seen", "last loss", "logit scale", "images/s", "seconds"))
    for curve in curves:
        table.add(
            curve.name,
            f"{curve.samples[-1]:,.0f}",
            f"{curve.losses[-1]:.3f}",
            f"{curve.logit_scale:.1f}",
            f"{curve.images_per_second:,.0f}",
            f"{curve.seconds:,.0f}",
        )
    return table


def _set_lines(found: Findings, key: str, scored: Scored | None) -> Iterator[str]:
    yield f"### {escape_markdown(found.set_name(key))}"
    warnings = found.describe_set(key)["warnings"]
    if warnings:
        yield "\n".join(f"> {escape_markdown(text)}" for text in warnings)
    yield markdown_table(tables.figure_table(found, key))
    is_ranked = scored is not None and scored.classes is not None
    classes = tables.class_table(found, key, taken_for(scored) if scored and is_ranked else {})
    if classes:
        weakest = classes.rows[:CLASSES_SHOWN]
        count = format_plural(len(classes.rows), "class", "classes")
        yield f"The {len(weakest)} weakest of {count}:"
        yield markdown_table(replace(classes, rows=weakest))
    if scored and is_ranked:
        confused = tables.confusion_table(scored, CONFUSIONS_SHOWN)
        yield from _titled_table("Commonest confusions:", confused)
    yield markdown_table(tables.set_provenance_table(found, key))
