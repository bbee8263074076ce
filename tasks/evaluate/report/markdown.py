"""The report of an evaluation as Markdown: for a pull request, a wiki, a terminal.

Covers: which parts it has, in which order; the short summary that goes with a flow run.
Not here: any figure, what stands in a table (overview.py, paper_form.py, set_tables.py), pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tasks.evaluate.metrics.scored import Scored
from tasks.evaluate.report import overview, set_tables, summary
from tasks.evaluate.report.curves import Curve
from tasks.evaluate.report.examples import commonest_confusions, taken_for
from tasks.evaluate.report.findings import Findings
from tasks.evaluate.report.numbers import plural
from tasks.evaluate.report.paper_form import paper_tables
from tasks.evaluate.report.tables import Table, escaped, markdown_of, row

CLASSES_SHOWN = 10
"""Weakest classes of a set; the page has all of them."""
CONFUSIONS_SHOWN = 5


def markdown(
    results: Mapping[str, Any],
    scored: Mapping[str, Mapping[str, Scored]],
    curves: Sequence[Curve],
) -> str:
    """The whole report."""
    found = Findings(results)
    parts = [*_head(found), *_all_sets(found), *_paper(found), *_models(found)]
    if curves:
        parts += ["## Training", markdown_of(_training(curves))]
    parts.append("## Set by set")
    for key in found.sets:
        parts += _set(found, key, scored.get(key, {}).get(found.subject))
    parts += ["## Where this comes from", markdown_of(overview.provenance(found))]
    return "\n\n".join(parts) + "\n"


def short_markdown(results: Mapping[str, Any]) -> str:
    """Summary and figures at a glance: what a person sees beside a flow run."""
    found = Findings(results)
    return "\n\n".join([*_head(found), *_all_sets(found)]) + "\n"


def _head(found: Findings) -> Iterator[str]:
    yield f"# {escaped(found.title)}"
    yield "\n".join(f"- {escaped(sentence)}" for sentence in summary.sentences(found))
    tiles = summary.tiles(found)
    rows = [
        row(tile.of, tile.value, ", ".join(f"{name} {value}" for name, value in tile.facts))
        for tile in tiles
    ]
    yield markdown_of(Table(("headline", "value", "beside"), tuple(rows), (), frozenset({2})))


def _all_sets(found: Findings) -> Iterator[str]:
    failed = overview.failures(found)
    if failed:
        yield "## Sets that could not be evaluated"
        yield markdown_of(failed)
    yield "## All sets at a glance"
    yield markdown_of(overview.at_a_glance(found))


def _paper(found: Findings) -> Iterator[str]:
    given = overview.verdicts(found)
    if given:
        yield "## Beside the paper"
        yield markdown_of(given)
    tables = paper_tables(found)
    if tables:
        yield "## The paper's tables"
        yield "In percent; known errors of the paper corrected and footnoted; ours in bold."
    for one in tables:
        yield f"### {escaped(one.title)}"
        yield markdown_of(one.table)
    for title, table in (
        ("Averages", overview.averages(found)),
        ("Robustness gap Δ", overview.robustness(found)),
    ):
        if table:
            yield f"### {title}"
            yield markdown_of(table)


def _models(found: Findings) -> Iterator[str]:
    for title, table in (
        ("Beside the other models", overview.comparisons(found, headlines_only=True)),
        ("Seen in training?", overview.contamination(found)),
    ):
        if table:
            yield f"## {title}"
            yield markdown_of(table)


def _training(curves: Sequence[Curve]) -> Table:
    rows = [
        row(
            curve.name,
            f"{curve.samples[-1]:,.0f}",
            f"{curve.losses[-1]:.3f}",
            f"{curve.logit_scale:.1f}",
            f"{curve.images_per_second:,.0f}",
            f"{curve.seconds:,.0f}",
        )
        for curve in curves
    ]
    head = ("stage", "pairs seen", "last loss", "logit scale", "images/s", "seconds")
    return Table(head, tuple(rows))


def _set(found: Findings, key: str, scored: Scored | None) -> Iterator[str]:
    yield f"### {escaped(found.name(key))}"
    warnings = found.set(key)["warnings"]
    if warnings:
        yield "\n".join(f"> {escaped(text)}" for text in warnings)
    yield markdown_of(set_tables.figures(found, key))
    ranked = scored is not None and scored.classes is not None
    classes = set_tables.classes(found, key, taken_for(scored) if scored and ranked else {})
    if classes:
        shown = min(CLASSES_SHOWN, len(classes.rows))
        yield f"The {shown} weakest of {plural(len(classes.rows), 'class', 'classes')}:"
        yield markdown_of(replace(classes, rows=classes.rows[:CLASSES_SHOWN]))
    confused = commonest_confusions(scored, CONFUSIONS_SHOWN) if scored and ranked else []
    if scored and confused:
        yield "Commonest confusions:"
        yield markdown_of(set_tables.confusions(confused, scored.evalset.classnames))
    yield markdown_of(set_tables.provenance(found, key))
