"""The paper's Tables 1 to 4 in the paper's form, published rows beside ours.

Covers: which of our figures stands in which column; our rows and their differences.
Not here: published figures and errata (paper.py), averages (averages.py), layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tasks.evaluate.metrics.metric import printed_columns
from tasks.evaluate.paper.published import Column, PaperModel, PaperTable, paper_model, table_of
from tasks.evaluate.paper.published import Row as PaperRow
from tasks.evaluate.report.findings import Findings
from tasks.evaluate.report.numbers import NOTHING, as_printed, signed, size
from tasks.evaluate.report.tables import Cell, Footnotes, Row, Table, row
from tasks.evaluate.sets.set_registry import known_sets

GROUPS = {
    "a": "(a) beside CLIP-Base baselines",
    "b": "(b) beside CLIP-Large baselines",
    "c": "(c) beside larger CLIPs trained with more samples",
}
UPRIGHT_FROM = 12
"""Columns from which the head is set upright."""


@dataclass(frozen=True)
class PaperForm:
    """One of the paper's tables with our rows in it."""

    key: str
    """Its anchor."""
    title: str
    table: Table


def paper_tables(found: Findings) -> list[PaperForm]:
    """Tables 1a, 1b, 2, 3 and 4, those of them that have a set of ours."""
    forms = []
    for key in ("1a", "1b", "2", "3", "4"):
        if any(found.figures(one, found.subject) for one in _places(key)):
            given = table_of(key)
            forms.append(
                PaperForm(f"table-{key}", f"Table {key}. {given.title}", _form(found, key))
            )
    return forms


def beside_of(found: Findings, model: str) -> PaperModel | None:
    """The paper's row that a model of ours belongs beside."""
    about = found.about(model)
    return paper_model(str(about.get("source") or ""), str(about["architecture"]))


def _places(table: str) -> Mapping[str, dict[str, str]]:
    """Set -> column of the table -> our figure that stands in it."""
    if table == "1a":
        return {"imagenet1k": {"in1k_zs_top1": "top1"}}
    return {
        key: printed_columns(known) for key, known in known_sets().items() if table in known.tables
    }


def _form(found: Findings, key: str) -> Table:
    given, notes = table_of(key), Footnotes()
    columns = [column for column in given.columns if column.key != "model"]
    rows: list[Row] = []
    group = ""
    for one in given.rows:
        if one.cells.get("group") != group:
            group = str(one.cells.get("group"))
            rows.append(row(GROUPS.get(group, group), style="group"))
        rows.append(_published(one, columns, notes))
    rows.append(row("this evaluation", style="group"))
    for model in found.models:
        rows += _ours(found, key, model, given, columns, notes)
    notes.numbers(given.notes)
    words = frozenset(
        place
        for place, column in enumerate(columns, 1)
        if column.key in ("precision", "data", "gpus", "image_size")
    )
    head = ("model", *(_label(column) for column in columns))
    return Table(head, tuple(rows), tuple(notes.texts), words, narrow=len(columns) >= UPRIGHT_FROM)


def _published(one: PaperRow, columns: list[Column], notes: Footnotes) -> Row:
    said = [set(one.notes.get(column.key, ())) for column in columns]
    of_row = set.intersection(*said)  # what concerns every cell stands at the model's name
    cells = [
        Cell(
            _printed(one.cells.get(column.key), column.unit),
            notes=notes.numbers(text for text in sorted(texts - of_row)),
        )
        for column, texts in zip(columns, said, strict=True)
    ]
    return row(Cell(one.model, notes=notes.numbers(sorted(of_row))), *cells, style="published")


def _printed(value: Any, unit: str) -> str:
    """A cell as the paper prints it: 82.0, 149M, 16 × A100 (40 GB)."""
    if value is None:
        return NOTHING
    if isinstance(value, Mapping):
        return f"{value['count']} × {value['type']} ({value['memory_gb']} GB)"
    if isinstance(value, str) or unit.startswith("pixels"):
        return str(value)
    if unit.startswith("percent"):
        return f"{float(value):.1f}"
    return size(float(value), digits=1 if unit == "parameters" else 0)


def _ours(
    found: Findings,
    key: str,
    model: str,
    given: PaperTable,
    columns: list[Column],
    notes: Footnotes,
) -> Iterator[Row]:
    values = dict(_values(found, key, model))
    cells = []
    for column in columns:
        text = _setting(found, model, column) if key == "1a" else None
        value = values.get(column.key)
        if text is not None:
            cells.append(Cell(text))
        elif value is not None:
            cells.append(Cell(as_printed(value)))
        else:
            cells.append(Cell(NOTHING, notes=notes.numbers(_why_not(found, key, model, column))))
    yield row(model, *cells, style="ours")
    ours = beside_of(found, model)
    beside = next((one for one in given.rows if ours and one.model == ours.row), None)
    if beside is not None:
        yield _differences(beside, columns, values)


def _differences(beside: PaperRow, columns: list[Column], values: Mapping[str, float]) -> Row:
    cells = []
    for column in columns:
        ours, published = values.get(column.key), beside.cells.get(column.key)
        if ours is None or published is None or column.unit == "parameters":
            cells.append(Cell(""))
            continue
        cells.append(Cell(signed(100 * ours - float(published))))
    return row(f"minus {beside.model}", *cells, style="difference")


def _values(found: Findings, key: str, model: str) -> Iterator[tuple[str, float]]:
    """Column -> our value, as a share."""
    for evalset, columns in _places(key).items():
        for column, metric in columns.items():
            share = found.share(evalset, model, metric)
            if share is not None:
                yield column, share
    average, gap = found.average(key, model), found.robustness(model)
    if average is not None and average.get("value") is not None:
        yield "avg", float(average["value"]) / 100
    if key == "1b" and gap is not None and gap.get("delta") is not None:
        yield "delta", float(gap["delta"]) / 100


def _setting(found: Findings, model: str, column: Column) -> str | None:
    """A cell of Table 1a that is no figure."""
    if column.unit == "percent":
        return None
    about = found.about(model)
    params = about.get("params")
    if column.key == "params_total" and params:
        return size(float(params), digits=1)
    if column.key == "image_size":
        return str(about["architecture"]).rpartition(" at ")[2].removesuffix(" px") or NOTHING
    return NOTHING


def _why_not(found: Findings, key: str, model: str, column: Column) -> list[str]:
    """Why there is no figure of ours in a cell."""
    if column.key in ("avg", "delta"):
        average = found.average(key, model)
        return [str(average["reason"])] if average and average.get("reason") else []
    for evalset, columns in _places(key).items():
        if column.key in columns:
            reason = found.failed.get(evalset)
            return [f"{found.name(evalset)}: {reason}"] if reason else []
    return []


def _label(column: Column) -> str:
    if column.label:
        return column.label
    words = {"in1k_zs_top1": "IN-1K top-1", "gpus": "GPUs"}
    if column.key in words:
        return words[column.key]
    for key, title in (("flickr30k", "Flickr30K"), ("coco", "COCO")):
        if column.key.startswith(key):
            what, _, depth = column.key.removeprefix(f"{key}_").partition("_")
            return f"{title} {what} {depth.upper().replace('R', 'R@')}"
    return column.key.replace("params_total", "params").replace("_", " ").replace("params ", "")
