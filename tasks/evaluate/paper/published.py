"""The paper's figures and averages, and the verdict on ours: reproduced, differs, not comparable.

Cells are kept as printed; errata are applied when they are read, unless printed cells are asked
for. What an erratum corrects, and what it only remarks on, is footnoted either way.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from evaclip_model.config import Config
from evaclip_model.model.model_config import ModelConfig, list_models
from tasks.evaluate.metrics.metric import printed_columns
from tasks.evaluate.sets.published_layout import EvalSet
from tasks.evaluate.sets.set_registry import KnownSet, find_set, known_sets

_FILE = Path(__file__).with_name("paper_tables.json")
HEADER = "header"
"""Stands for a table's heading where an erratum names a column."""

UNKNOWN_TOLERANCE = 1.5
"""Points; of sets that nobody has measured twice in the same way, the loosest of the others."""
CAPTIONS = {"flickr30k": 5_000, "coco": 25_010}
"""Captions of the retrieval sets as the paper's figures have them."""

TABLES = ("1b", "2", "3")
"""Those that have an average."""
ROBUSTNESS = "1b"
BASE = "imagenet1k"
"""Set that the gap is measured from."""

Ruling = Literal["reproduced", "differs", "not comparable"]


class Correction(Config):
    table: str
    model: str | None
    """Row; None for the label of a column, or for the heading."""
    column: str
    printed: float | str
    expected: float | str


class Remark(Config):
    """Cells that an erratum is about without correcting them."""

    table: str
    models: tuple[str, ...]
    """Rows; none for the table as a whole."""
    columns: tuple[str, ...]
    """None for all."""


class Erratum(Config):
    """One thing that is wrong in the paper, or looks wrong."""

    id: str
    kind: str
    about: str
    cells: tuple[Correction, ...]
    rows: tuple[Remark, ...]


class Released(Config):
    """The names under which the weights behind a row were published."""

    row: str
    architecture: str | None
    """Of ours, or none."""
    files: tuple[str, ...]
    open_clip: tuple[str, ...]
    """NAME/TAG."""
    note: str
    """A remark for whoever compares with this row."""


class PaperColumn(Config):
    """The meaning of the cells below a heading."""

    key: str
    label: str = ""
    unit: str = ""
    metric: str = ""


@dataclass(frozen=True)
class PaperRow:
    """One model, or one line of an ablation."""

    model: str
    """"" where rows are not models."""
    cells: Mapping[str, Any]
    """By column, and `group`: "a", "b" or "c" where the table is in parts; rates in percent."""
    notes: Mapping[str, tuple[str, ...]]
    """Footnotes by column."""


@dataclass(frozen=True)
class PaperTable:
    title: str
    header: str
    """Its heading, where models stand in it."""
    columns: tuple[PaperColumn, ...]
    rows: tuple[PaperRow, ...]
    notes: tuple[str, ...]
    """Remarks on the table as a whole."""


@dataclass(frozen=True)
class PaperFigure:
    row: str
    """Model, as the paper calls it."""
    value: float
    """Percent."""
    tolerance: float | None
    """Points within which ours counts as the same."""
    errata: tuple[str, ...] = ()
    """Footnotes."""
    note: str = ""
    """A remark for whoever compares with the row."""


@dataclass(frozen=True)
class PaperModel:
    """The row of the paper that a model belongs beside."""

    row: str
    is_released: bool
    """True: the very model, by the name of its weights; else another of its architecture."""


@dataclass(frozen=True)
class PaperVerdict:
    verdict: Ruling
    reason: str
    """One clause."""


@functools.cache
def table_of(key: str, *, as_printed: bool = False) -> PaperTable:
    """Table `key` ("1a", "1b", "2" ... "10")."""
    raw = _load_tables()["tables"][key]
    corrected = {} if as_printed else _list_corrections(key)
    columns = tuple(PaperColumn.model_validate(column) for column in raw["columns"])
    return PaperTable(
        title=raw["title"],
        header=str(corrected.get((None, HEADER), raw.get(HEADER, ""))),
        columns=tuple(
            column.model_copy(update={"label": corrected.get((None, column.key), column.label)})
            for column in columns
        ),
        rows=tuple(_make_row(key, row, corrected) for row in raw["rows"]),
        notes=tuple(
            _erratum_footnote(erratum)
            for erratum in list_errata()
            if any(one.table == key and not one.models for one in erratum.rows)
            or any(one.table == key and one.model is None for one in erratum.cells)
        ),
    )


def rows_of(key: str, *, as_printed: bool = False) -> tuple[PaperRow, ...]:
    return table_of(key, as_printed=as_printed).rows


@functools.cache
def list_errata() -> tuple[Erratum, ...]:
    return tuple(Erratum.model_validate(entry) for entry in _load_tables()["errata"])


def paper_model(source: str, architecture: str) -> PaperModel | None:
    """The row that a model belongs beside; none where the paper has no such architecture.

    `source` is FOLDER, FILE:ARCHITECTURE or open_clip:NAME/TAG; `architecture` has a name and a
    size, such as "EVA02-CLIP-B-16 at 224 px".
    """
    kind, _, named = source.partition(":")
    file = Path(source.rpartition(":")[0]).name
    name, _, px = architecture.removesuffix(" px").partition(" at ")
    for one in _list_released():
        if file in one.files or (kind == "open_clip" and named in one.open_clip):
            return PaperModel(one.row, True)
    for one in _list_released():
        if one.architecture is not None and px and _is_same(one.architecture, name, int(px)):
            return PaperModel(one.row, False)
    return None


def find_published(
    row: str, set_key: str, metric: str, *, as_printed: bool = False
) -> PaperFigure | None:
    """The paper's figure of a model (its row) on a set; none where it prints none."""
    known = find_set(set_key)
    columns = {figure: column for column, figure in printed_columns(known).items()} if known else {}
    if known is None or metric not in columns:
        return None
    column = columns[metric]
    for one in rows_of(known.tables[0], as_printed=as_printed):
        if one.model == row:
            note = next(model.note for model in _list_released() if model.row == row)
            return PaperFigure(
                row, float(one.cells[column]), known.tolerance, one.notes.get(column, ()), note
            )
    return None


def judge_figure(
    ours: float,
    reference: PaperFigure,
    evalset: EvalSet,
    model: PaperModel,
    *,
    split: str = "",
) -> PaperVerdict:
    """The verdict on a figure of ours, a share, beside the published one.

    `split` says which images these are: without it a set is not compared of which the paper does
    not name the images.
    """
    why_not = next(_list_obstacles(reference, evalset, model, split), None)
    if why_not is not None:
        return PaperVerdict("not comparable", why_not)
    tolerance = UNKNOWN_TOLERANCE if reference.tolerance is None else reference.tolerance
    apart = abs(100 * ours - reference.value)
    distance = (
        f"{apart:.2f} points from {reference.value:.1f}, where {tolerance:g} count as the same"
    )
    if apart <= tolerance + 1e-9:
        return PaperVerdict("reproduced", distance)
    return PaperVerdict("differs", f"{distance}; {reference.note}" if reference.note else distance)


@dataclass(frozen=True)
class Average:
    """Unweighted mean over the sets of a table, in percent."""

    value: float | None
    """None where a set is missing."""
    sets: tuple[str, ...]
    """Those that were evaluated, in the table's order."""
    missing: tuple[str, ...]
    reason: str
    """The reason why there is no value; "" where there is one."""
    published: float | None
    """The paper's average of the row beside, over all sets."""
    intersection_value: float | None
    """Mean over the sets there are."""
    intersection_reference: float | None
    """Mean of the published row over the same sets."""


@dataclass(frozen=True)
class Gap:
    """Points that a model loses on ImageNet's variants against ImageNet."""

    imagenet1k: float | None
    """Percent."""
    average: float | None
    """Of the six sets of Table 1b, ImageNet among them; percent."""
    delta: float | None
    """The first less the second; the smaller the better."""
    published: float | None
    reason: str
    """The reason why there is no gap; "" where there is one."""


def average_table(
    table: str, values: Mapping[str, float], row: str | None = None, *, as_printed: bool = False
) -> Average:
    """Average of the sets of table "1b", "2" or "3", beside the paper's model `row`.

    `values` is set -> its figure in the table's metric, a share; other sets are passed over.
    """
    members = members_of(table)
    sets = tuple(key for key in members if key in values)
    missing = tuple(key for key in members if key not in values)
    mean = 100 * fmean(values[key] for key in sets) if sets else None
    references = [
        found.value
        for key in sets
        if row and (found := find_published(row, key, members[key].metric, as_printed=as_printed))
    ]
    return Average(
        value=None if missing else mean,
        sets=sets,
        missing=missing,
        reason=_explain_refusal(len(members), missing),
        published=_find_cell(table, row, "avg", as_printed),
        intersection_value=mean,
        intersection_reference=fmean(references) if sets and len(references) == len(sets) else None,
    )


def robustness_gap(
    values: Mapping[str, float], row: str | None = None, *, as_printed: bool = False
) -> Gap:
    """The gap of Table 1b from set -> top-1, a share; none where one of the six is missing."""
    mean = average_table(ROBUSTNESS, values, row, as_printed=as_printed)
    base = 100 * values[BASE] if BASE in values else None
    return Gap(
        imagenet1k=base,
        average=mean.value,
        delta=None if mean.value is None or base is None else base - mean.value,
        published=_find_cell(ROBUSTNESS, row, "delta", as_printed),
        reason=mean.reason,
    )


def values_of(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Set -> its figure in the paper's metric, from set -> figures; only sets of Tables 1 to 3."""
    return {
        key: float(figures[key][known.metric])
        for key, known in known_sets().items()
        if key in figures and known.metric in figures[key]
    }


def members_of(table: str) -> dict[str, KnownSet]:
    return {key: known for key, known in known_sets().items() if table in known.tables}


def _explain_refusal(members: int, missing: tuple[str, ...]) -> str:
    if not missing:
        return ""
    return f"{len(missing)} of its {members} sets not evaluated: {', '.join(missing)}"


def _find_cell(table: str, row: str | None, column: str, as_printed: bool) -> float | None:
    rows = [one for one in rows_of(table, as_printed=as_printed) if row and one.model == row]
    return float(rows[0].cells[column]) if rows else None


def _list_obstacles(
    reference: PaperFigure, evalset: EvalSet, model: PaperModel, split: str
) -> Iterator[str]:
    known = evalset.known
    if known is None or not known.tables:
        yield "the set is not one of the paper's"
        return
    if not model.is_released:
        yield f"the model has the architecture of {model.row}, not its weights"
    if any(note.startswith("E25") for note in reference.errata):
        yield "the paper measured this model with another normalisation than it was trained with"
    n, captions = len(evalset), sum(len(sample.captions) for sample in evalset.samples)
    if known.n is not None and n != known.n:
        yield f"these are {n:,} images, the figure is of {known.n:,}"
    if captions != CAPTIONS.get(known.key, captions):
        yield f"these are {captions:,} captions, the figure is of {CAPTIONS[known.key]:,}"
    if known.classes is not None and len(evalset.classnames) != known.classes:
        yield f"these are {len(evalset.classnames):,} classes, the figure is of {known.classes:,}"
    if known.templates is not None and len(evalset.templates) != known.templates:
        yield f"these are {len(evalset.templates)} prompts a class, others use {known.templates}"
    if evalset.crop_px:
        yield f"{evalset.crop_px} pixels are cut off every image, which the paper does not do"
    if not known.split_stated and not split:
        yield "split not stated by the paper: say in the recipe which images these are"


def _make_row(table: str, raw: Mapping[str, Any], corrected: Mapping[Any, Any]) -> PaperRow:
    model = str(raw.get("model", ""))
    cells = {
        column: corrected.get((model, column), value)
        for column, value in raw.items()
        if column != "model"
    }
    notes: dict[str, tuple[str, ...]] = {}
    for column in cells.keys() - {"group"}:
        found = tuple(
            _erratum_footnote(one, model, column)
            for one in list_errata()
            if _concerns_cell(one, table, model, column)
        )
        if found:
            notes[column] = found
    return PaperRow(model, cells, notes)


def _concerns_cell(erratum: Erratum, table: str, model: str, column: str) -> bool:
    corrects = any(
        (one.table, one.model, one.column) == (table, model, column) for one in erratum.cells
    )
    remarks = any(
        one.table == table and model in one.models and (not one.columns or column in one.columns)
        for one in erratum.rows
    )
    return corrects or remarks


def _list_corrections(table: str) -> dict[tuple[str | None, str], float | str]:
    """(Row or None, column) -> what the cell should be."""
    return {
        (cell.model, cell.column): cell.expected
        for erratum in list_errata()
        for cell in erratum.cells
        if cell.table == table
    }


def _erratum_footnote(erratum: Erratum, model: str | None = None, column: str = "") -> str:
    """An erratum in words, with what is printed in the cell it stands at."""
    printed = dict.fromkeys(
        f" (printed: {cell.printed if isinstance(cell.printed, str) else f'{cell.printed:,.10g}'})"
        for cell in erratum.cells
        if cell.model == model and column in ("", cell.column)
    )
    return f"{erratum.id}, {erratum.kind}: {erratum.about}{''.join(printed)}"


def _is_same(shipped: str, name: str, px: int) -> bool:
    is_known = name in list_models()
    return is_known and ModelConfig.load(name).at_image_px(px) == ModelConfig.load(shipped)


@functools.cache
def _list_released() -> tuple[Released, ...]:
    return tuple(Released.model_validate(entry) for entry in _load_tables()["models"])


@functools.cache
def _load_tables() -> Mapping[str, Any]:
    loaded: Mapping[str, Any] = json.loads(_FILE.read_text())
    return loaded
