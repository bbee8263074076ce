"""Averages over the sets of a table, refused where one is missing, and the robustness gap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from tasks.evaluate.paper.published import find_published, rows_of
from tasks.evaluate.sets.set_registry import KnownSet, known_sets

TABLES = ("1b", "2", "3")
"""Those that have an average."""
ROBUSTNESS = "1b"
BASE = "imagenet1k"
"""Set that the gap is measured from."""


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
    """Average of a table's sets.

    Args:
        table: "1b", "2" or "3".
        values: set -> its figure in the table's metric, a share; other sets are passed over.
        row: the paper's model that the average is shown beside.
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
