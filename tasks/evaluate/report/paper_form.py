"""The paper's Tables 1 to 4 in the paper's form, published rows beside ours."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from tasks.evaluate.metrics.metric import printed_columns
from tasks.evaluate.paper.published import PaperColumn, PaperRow, members_of, paper
from tasks.evaluate.report.findings import Findings
from tasks.evaluate.report.numbers import format_points, format_signed, format_size
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


class PaperForm(NamedTuple):
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
        if any(found.set_results(one, found.subject) for one, _ in _figures_of(key).values())
    ]


def _figures_of(table: str) -> dict[str, tuple[str, str]]:
    """Column of the table -> the set and the figure of ours that stands in it."""
    if table == "1a":
        return {"in1k_zs_top1": ("imagenet1k", "top1")}
    return {
        column: (key, metric)
        for key, known in members_of(table).items()
        for column, metric in printed_columns(known).items()
    }


def _fill_table(found: Findings, key: str) -> Table:
    given, figures = paper().tables[key], _figures_of(key)
    ours = {model: _our_values(found, key, model) for model in found.models}
    failed = {
        column: f"{found.set_name(one)}: {found.failed[one]}"
        for column, (one, _) in figures.items()
        if one in found.failed
    }
    known = failed.keys() | {column for values in ours.values() for column in values}
    columns = [
        one for one in given.columns if one.key in known or (key == "1a" and one.key != "model")
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
    for model, values in ours.items():
        texts = _describe_settings(found.describe_model(model))
        texts |= {column: format_points(100 * value) for column, value in values.items()}
        cells = (
            Cell(texts.get(one.key, NOTHING), notes=table.cite([failed[one.key]]))
            if one.key in failed
            else texts.get(one.key, NOTHING)
            for one in columns
        )
        table.add(model, *cells, style="ours")
        row = (found.describe_model(model)["paper"] or {}).get("row")
        for beside in (one.cells for one in given.rows if one.model == row):
            differences = (
                format_signed(100 * values[one.key] - float(beside[one.key]))
                if one.key in values and beside.get(one.key) is not None
                else ""
                for one in columns
            )
            table.add(f"minus {row}", *differences, style="difference")
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


def _our_values(found: Findings, key: str, model: str) -> dict[str, float]:
    """Column -> our value, as a share."""
    figures = _figures_of(key).items()
    values = {column: found.set_results(one, model).get(name) for column, (one, name) in figures}
    average = found.table_average(key, model)
    for column, name in (("avg", "value"), ("delta", "delta")):
        percent = average.get(name)
        values[column] = None if percent is None else percent / 100
    return {column: value for column, value in values.items() if value is not None}


def _describe_settings(about: Mapping[str, Any]) -> dict[str, str]:
    """Column of Table 1a -> what is known of a model of ours."""
    px = str(about["architecture"]).rpartition(" at ")[2].removesuffix(" px")
    params = about["params"]
    return {
        "params_total": format_size(float(params), digits=1) if params else NOTHING,
        "image_size": px or NOTHING,
    }
