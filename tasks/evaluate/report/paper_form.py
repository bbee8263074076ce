"""The paper's Tables 1 to 4 in the paper's form, published rows beside ours."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tasks.evaluate.metrics.metric import printed_columns
from tasks.evaluate.paper.published import (
    PaperColumn,
    PaperRow,
    PaperTable,
    paper,
)
from tasks.evaluate.report.findings import Findings
from tasks.evaluate.report.numbers import format_points, format_signed, format_size
from tasks.evaluate.sets.set_registry import known_sets
from tasks.table import NOTHING, Cell, Table, TableColumn

GROUPS = {
    "a": "(a) beside CLIP-Base baselines",
    "b": "(b) beside CLIP-Large baselines",
    "c": "(c) beside larger CLIPs trained with more samples",
}
UPRIGHT_FROM = 12
"""Columns from which the head is set upright."""
WORDS = ("precision", "data", "gpus", "image_size")
"""Columns that are not numbers."""


@dataclass(frozen=True)
class PaperForm:
    key: str
    """Its anchor."""
    title: str
    table: Table


def paper_tables(found: Findings) -> list[PaperForm]:
    """Tables 1a, 1b, 2, 3 and 4, those of them that have a set of ours."""
    return [
        PaperForm(
            f"table-{key}", f"Table {key}. {paper().tables[key].title}", _fill_table(found, key)
        )
        for key in ("1a", "1b", "2", "3", "4")
        if any(found.set_results(one, found.subject) for one in _columns_of_sets(key))
    ]


def _columns_of_sets(table: str) -> Mapping[str, dict[str, str]]:
    """Set -> column of the table -> our figure that stands in it."""
    if table == "1a":
        return {"imagenet1k": {"in1k_zs_top1": "top1"}}
    return {
        key: printed_columns(known) for key, known in known_sets().items() if table in known.tables
    }


def _fill_table(found: Findings, key: str) -> Table:
    given = paper().tables[key]
    ours = {column for model in found.models for column, _ in _our_values(found, key, model)}
    failed = {
        column
        for evalset, named in _columns_of_sets(key).items()
        for column in named
        if evalset in found.failed
    }
    columns = [
        one
        for one in given.columns
        if one.key in ours | failed or (key == "1a" and one.key != "model")
    ]
    heads = [TableColumn(one.label, has_words=one.key in WORDS) for one in columns]
    table = Table.of("model", *heads, is_upright=len(columns) >= UPRIGHT_FROM)
    group = ""
    for one in given.rows:
        if one.cells.get("group") != group:
            group = str(one.cells.get("group"))
            table.add(GROUPS.get(group, group), style="group")
        _add_published(table, one, columns)
    table.add("this evaluation", style="group")
    for model in found.models:
        _add_ours(table, found, key, model, given, columns)
    table.cite(given.notes)
    return table


def _add_published(table: Table, one: PaperRow, columns: list[PaperColumn]) -> None:
    said = [set(one.footnotes(column.key)) for column in columns]
    of_row = set.intersection(*said)  # what concerns every cell stands at the model's name
    cells = [
        Cell(
            _print_cell(one.cells.get(column.key), column.unit),
            notes=table.cite(sorted(texts - of_row)),
        )
        for column, texts in zip(columns, said, strict=True)
    ]
    table.add(Cell(one.model, notes=table.cite(sorted(of_row))), *cells, style="published")


def _print_cell(value: Any, unit: str) -> str:
    """A cell as the paper prints it: 82.0, 149M, 16 × A100 (40 GB)."""
    if value is None:
        return NOTHING
    if isinstance(value, Mapping):
        return f"{value['count']} × {value['type']} ({value['memory_gb']} GB)"
    if isinstance(value, str) or unit.startswith("pixels"):
        return str(value)
    if unit.startswith("percent"):
        return f"{float(value):.1f}"
    return format_size(float(value), digits=1 if unit == "parameters" else 0)


def _add_ours(
    table: Table,
    found: Findings,
    key: str,
    model: str,
    given: PaperTable,
    columns: list[PaperColumn],
) -> None:
    values = dict(_our_values(found, key, model))
    cells = []
    for column in columns:
        if key == "1a" and column.unit != "percent":
            cells.append(Cell(_setting_cell(found, model, column)))
        elif column.key in values:
            cells.append(Cell(format_points(100 * values[column.key])))
        else:
            cells.append(Cell(NOTHING, notes=table.cite(_why_not(found, key, column))))
    table.add(model, *cells, style="ours")
    row = (found.describe_model(model)["paper"] or {}).get("row")
    beside = next((one for one in given.rows if one.model == row), None)
    if beside is None:
        return
    differences = []
    for column in columns:
        value, published = values.get(column.key), beside.cells.get(column.key)
        if value is None or published is None or column.unit == "parameters":
            differences.append("")
        else:
            differences.append(format_signed(100 * value - float(published)))
    table.add(f"minus {beside.model}", *differences, style="difference")


def _our_values(found: Findings, key: str, model: str) -> Iterator[tuple[str, float]]:
    """Column -> our value, as a share."""
    for evalset, columns in _columns_of_sets(key).items():
        for column, metric in columns.items():
            share = found.set_results(evalset, model).get(metric)
            if share is not None:
                yield column, share
    average = found.table_average(key, model)
    for column, name in (("avg", "value"), ("delta", "delta")):
        if average.get(name) is not None:
            yield column, average[name] / 100


def _setting_cell(found: Findings, model: str, column: PaperColumn) -> str:
    about = found.describe_model(model)
    if column.key == "params_total" and about["params"]:
        return format_size(float(about["params"]), digits=1)
    if column.key == "image_size":
        return str(about["architecture"]).rpartition(" at ")[2].removesuffix(" px") or NOTHING
    return NOTHING


def _why_not(found: Findings, key: str, column: PaperColumn) -> list[str]:
    return [
        f"{found.set_name(evalset)}: {found.failed[evalset]}"
        for evalset, columns in _columns_of_sets(key).items()
        if column.key in columns and evalset in found.failed
    ]
