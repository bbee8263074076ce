"""The paper's figures and averages, and the verdict on ours: reproduced, differs, not comparable.

`paper_tables.json` has the cells as they should be; what an erratum corrected or only remarks on is
footnoted.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

from evaclip_model.config import Config
from evaclip_model.model.model_config import ModelConfig, list_models
from tasks.evaluate.metrics.metric import printed_columns
from tasks.evaluate.sets.published_layout import EvalSet
from tasks.evaluate.sets.set_registry import KnownSet, find_set, known_sets

UNKNOWN_TOLERANCE = 1.5
"""Points; of sets that nobody has measured twice in the same way, the loosest of the others."""
CAPTIONS = {"flickr30k": 5_000, "coco": 25_010}
"""Captions of the retrieval sets as the paper's figures have them."""

TABLES = ("1b", "2", "3")
"""Those that have an average."""
ROBUSTNESS = "1b"
BASE = "imagenet1k"
"""Set that the gap of Table 1b is measured from."""


class PublishedModel(Config):
    """One model of the paper, and by what its weights are known."""

    row: str
    architecture: str | None
    sha256: tuple[str, ...]
    """Of the files that were published, where their publisher names it."""
    open_clip: tuple[str, ...]
    """NAME/TAG under which that library downloads them."""
    gflops: float
    """Of one image through the image tower, as `evaclip_model.training.cost.image_flops` counts."""
    note: str
    """For whoever compares with this row."""


class PaperColumn(Config):
    key: str
    label: str = ""
    unit: str = ""


class PaperRow(Config):
    """One model, or one line of an ablation."""

    model: str
    """"" where rows are not models."""
    cells: Mapping[str, Any]
    """By column, and `group`: "a", "b" or "c" where the table is in parts; rates in percent."""
    printed: Mapping[str, Any] = {}
    """Cells of columns that an erratum corrected, as the paper prints them."""
    errata: Mapping[str, tuple[str, ...]] = {}
    """Errata of columns, the one that corrects first."""

    def footnotes(self, column: str) -> tuple[str, ...]:
        notes = [paper().errata[one] for one in self.errata.get(column, ())]
        if column in self.printed:
            cell = self.printed[column]
            notes[0] += f" (printed: {cell if isinstance(cell, str) else f'{cell:,.10g}'})"
        return tuple(notes)


class PaperTable(Config):
    title: str
    header: str = ""
    """Its heading, where models stand in it."""
    notes: tuple[str, ...]
    columns: tuple[PaperColumn, ...]
    rows: tuple[PaperRow, ...]


class Paper(Config):
    """The figures that the paper prints, and what is known of its models."""

    source: str
    models: tuple[PublishedModel, ...]
    errata: Mapping[str, str]
    """"E1" ... "E27" -> kind and text."""
    tables: Mapping[str, PaperTable]
    """"1a", "1b", "2" ... "10"."""


@functools.cache
def paper() -> Paper:
    return Paper.model_validate_json(Path(__file__).with_name("paper_tables.json").read_text())


@dataclass(frozen=True)
class PaperFigure:
    value: float
    """Percent."""
    tolerance: float | None
    """Points within which ours counts as the same."""
    errata: tuple[str, ...] = ()
    """Footnotes."""
    note: str = ""


@dataclass(frozen=True)
class PaperModel:
    """The row of the paper that a model belongs beside."""

    row: str
    is_released: bool
    """True: the very model, by the content of its file; else another of its architecture."""


class PaperVerdict(NamedTuple):
    verdict: Literal["reproduced", "differs", "not comparable"]
    reason: str
    """One clause."""


def rows_of(key: str) -> tuple[PaperRow, ...]:
    return paper().tables[key].rows


def paper_model(
    source: str, architecture: str, sha256: str = "", released: Mapping[str, str] | None = None
) -> PaperModel | None:
    """The row that a model belongs beside; none where the paper has no such architecture.

    `source` is FOLDER, FILE:ARCHITECTURE or open_clip:NAME/TAG, `architecture` a name and size as
    in "EVA02-CLIP-B-16 at 224 px". Weights are the published ones by the SHA-256 of their file, of
    the paper's models or of `released` (SHA-256 -> row), or by an open_clip tag.
    """
    if released and sha256 in released:
        return PaperModel(released[sha256], True)
    kind, _, named = source.partition(":")
    name, _, px = architecture.removesuffix(" px").partition(" at ")
    for one in paper().models:
        if sha256 in one.sha256 or (kind == "open_clip" and named in one.open_clip):
            return PaperModel(one.row, True)
    if px and name in list_models():
        ours = ModelConfig.load(name).at_image_px(int(px))
        for one in paper().models:
            if one.architecture is not None and ModelConfig.load(one.architecture) == ours:
                return PaperModel(one.row, False)
    return None


def find_published(row: str, set_key: str, metric: str) -> PaperFigure | None:
    """The paper's figure of a model (its row) on a set; none where it prints none."""
    known = find_set(set_key)
    columns = {figure: column for column, figure in printed_columns(known).items()} if known else {}
    if known is None or metric not in columns:
        return None
    notes = {one.row: one.note for one in paper().models}
    for one in rows_of(known.tables[0]):
        if one.model == row:
            column = columns[metric]
            value, errata = float(one.cells[column]), one.footnotes(column)
            return PaperFigure(value, known.tolerance, errata, notes[row])
    return None


def judge_figure(
    ours: float, reference: PaperFigure, evalset: EvalSet, model: PaperModel, *, split: str = ""
) -> PaperVerdict:
    """The verdict on a figure of ours, a share, beside the published one.

    `split` says which images these are: without it a set is not compared of which the paper does
    not name the images.
    """
    if why_not := next(_list_obstacles(reference, evalset, model, split), None):
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
    intersection_value: float | None
    """Mean over the sets there are."""
    intersection_reference: float | None
    """Mean of the published row over the same sets."""
    delta: float | None = None
    """Of Table 1b: points that a model loses against ImageNet-1K, whose figure less `value`."""


def average_table(table: str, values: Mapping[str, float], row: str | None = None) -> Average:
    """Average of the sets of table "1b", "2" or "3", beside the paper's model `row`.

    `values` is set -> its figure in the table's metric, a share; other sets are passed over.
    """
    members = members_of(table)
    average = average_sets(tuple(members), values)
    found = [row and find_published(row, key, members[key].metric) for key in average.sets]
    if found and all(found):
        average = replace(average, intersection_reference=fmean(one.value for one in found if one))
    if table == ROBUSTNESS and average.value is not None:
        average = replace(average, delta=100 * values[BASE] - average.value)
    return average


def average_sets(members: Sequence[str], values: Mapping[str, float]) -> Average:
    """Average of some sets, from set -> its figure, a share; none where one of them is missing."""
    sets = tuple(key for key in members if key in values)
    missing = tuple(key for key in members if key not in values)
    mean = 100 * fmean(values[key] for key in sets) if sets else None
    reason = f"{len(missing)} of its {len(members)} sets not evaluated: {', '.join(missing)}"
    return Average(None if missing else mean, sets, missing, reason if missing else "", mean, None)


def values_of(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Set -> its figure in the paper's metric, from set -> figures; only sets of Tables 1 to 3."""
    return {
        key: float(figures[key][known.metric])
        for key, known in known_sets().items()
        if key in figures and known.metric in figures[key]
    }


def members_of(table: str) -> dict[str, KnownSet]:
    return {key: known for key, known in known_sets().items() if table in known.tables}


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
    for what, here, there in (
        ("images", len(evalset), known.n),
        ("captions", len(evalset.captions), CAPTIONS.get(known.key)),
        ("classes", len(evalset.classnames), known.classes),
    ):
        if there is not None and here != there:
            yield f"these are {here:,} {what}, the figure is of {there:,}"
    if known.templates is not None and len(evalset.templates) != known.templates:
        yield f"these are {len(evalset.templates)} prompts a class, others use {known.templates}"
    if evalset.crop_px:
        yield f"{evalset.crop_px} pixels are cut off every image, which the paper does not do"
    if not known.split_stated and not split:
        yield "split not stated by the paper: say in the recipe which images these are"
