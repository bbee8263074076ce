"""Tables of one set: its figures, its classes, its confusions, what they rest on.

Covers: what stands in them.
Not here: tables over all sets (overview.py), pictures (examples.py), layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.evaluate.metrics.metric import title_of
from tasks.evaluate.report.examples import Confusion
from tasks.evaluate.report.findings import Findings
from tasks.evaluate.report.numbers import NOTHING, interval, percent, plural, times
from tasks.evaluate.report.tables import Cell, Row, Table, row

TEMPLATES_SHOWN = 4


def figures(found: Findings, evalset: str) -> Table:
    """Every figure of the subject on a set, beside the other models and chance."""
    model = found.subject
    rows = []
    for metric in found.metrics(evalset):
        ours = found.share(evalset, model, metric) or 0.0
        bounds = found.bounds(evalset, model, metric)
        spread = found.interval(evalset, model, metric)
        chance = found.chance(evalset, metric)
        others = [found.share(evalset, other, metric) for other in found.others]
        rows.append(
            row(
                title_of(metric),
                Cell(percent(ours), "value"),
                interval(spread) if spread else NOTHING,
                _under_ties(bounds),
                *(NOTHING if share is None else percent(share) for share in others),
                NOTHING if chance is None else percent(chance),
                times(ours, chance) if chance else NOTHING,
            )
        )
    head = ("metric", model, "95 % interval", "under ties", *found.others)
    return Table((*head, "chance", "times chance"), tuple(rows))


def classes(
    found: Findings, evalset: str, taken_for: Mapping[int, tuple[int, int]]
) -> Table | None:
    """Every class of a set by its share of right answers, the weakest first.

    `taken_for` is class -> the other class that its images were most often given, and how often.
    """
    entries = (found.figures(evalset, found.subject) or {}).get("per_class")
    if not entries:
        return None
    names = [str(one["name"]) for one in entries]
    is_precision = "average_precision" in entries[0]
    rows = [
        (_share(one), index, _class_row(one, names, taken_for.get(index), is_precision))
        for index, one in enumerate(entries)
        if one["n"]
    ]
    rows.sort(key=lambda item: item[:2])
    if is_precision:
        head: tuple[str, ...] = ("class", "images", "average precision")
        return Table(head, tuple(one for _, _, one in rows))
    head = ("class", "images", "right", "share", "most often taken for")
    return Table(head, tuple(one for _, _, one in rows), text_columns=frozenset({4}))


def confusions(given: Sequence[Confusion], names: Sequence[str]) -> Table:
    """The commonest confusions, without their pictures."""
    rows = [
        row(names[one.actual], names[one.said], f"{len(one.images):,} of {one.of:,}")
        for one in given
    ]
    return Table(("class", "taken for", "images of the class"), tuple(rows), (), frozenset({1}))


def provenance(found: Findings, evalset: str) -> Table:
    """What a set's figures rest on."""
    about, known = found.set(evalset), found.known(evalset)
    n, expected = int(about["n"]), about.get("expected_n")
    size = f"{plural(n, 'image')} in its index, all evaluated once"
    if expected:
        size += f"; the set that reproduces the paper has {expected:,}"
    rows = [row("images", size)]
    if about.get("split"):
        unsure = known is not None and not known.split_stated
        note = " (split not stated by the paper)" if unsure else ""
        rows.append(row("split", f"{about['split']}{note}"))
    rows.append(row("content", Cell(str(about["fingerprint"]), "code")))
    if about.get("prompts_source"):
        rows.append(row("names and prompts from", str(about["prompts_source"])))
    rows.append(row("prompts", _prompts(list(about["templates"]))))
    rows.append(row("texts", Cell(str(about["prompts_digest"]), "code")))
    if known is not None:
        rows.append(row("terms", known.licence))
        rows += [row("beware", trap) for trap in known.traps]
    return Table(("what", "is"), tuple(rows), text_columns=frozenset({1}))


def _class_row(
    one: Mapping[str, Any],
    names: Sequence[str],
    taken: tuple[int, int] | None,
    is_precision: bool,
) -> Row:
    share = _share(one)
    shown = Cell(percent(share), share=share)
    if is_precision:
        return row(str(one["name"]), f"{one['n']:,}", shown)
    said = f"{names[taken[0]]} ({taken[1]:,})" if taken and taken[0] < len(names) else NOTHING
    return row(str(one["name"]), f"{one['n']:,}", f"{one['correct']:,}", shown, said)


def _share(one: Mapping[str, Any]) -> float:
    return float(one.get("share") or one.get("average_precision") or 0.0)


def _under_ties(bounds: tuple[float, float] | None) -> str:
    if bounds is None:
        return NOTHING
    return "the same" if bounds[0] == bounds[1] else interval(bounds)


def _prompts(templates: Sequence[str]) -> str:
    if not templates:
        return "none: captions as they are"
    shown = ", ".join(f"“{one}”" for one in templates[:TEMPLATES_SHOWN])
    more = len(templates) - TEMPLATES_SHOWN
    return f"{len(templates)}: {shown}" + (f" and {more} more" if more > 0 else "")
