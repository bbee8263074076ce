"""Tables of one set: its figures, its classes, its confusions, the data behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tasks.evaluate.report.examples import Confusion
from tasks.evaluate.report.findings import Findings
from tasks.evaluate.report.numbers import (
    format_interval,
    format_percent,
    format_plural,
    format_times,
)
from tasks.table import NOTHING, Cell, Table, words

TEMPLATES_SHOWN = 4


def figure_table(found: Findings, evalset: str) -> Table:
    """Every figure of the subject on a set, beside the other models and chance."""
    table = Table.of(
        *("metric", found.subject, "95 % interval", "under ties", *found.others),
        *("chance", "times chance"),
    )
    for one in found.list_figures(evalset, found.subject):
        is_tied = one.bounds is not None and one.bounds[0] != one.bounds[1]
        table.add(
            one.title,
            Cell(format_percent(one.value), "value"),
            format_interval(one.interval),
            format_interval(one.bounds) if is_tied or one.bounds is None else "the same",
            *(
                format_percent(found.get_figure(evalset, other, one.metric).value)
                for other in found.others
            ),
            format_percent(one.chance),
            format_times(one.value, one.chance),
        )
    return table


def class_table(
    found: Findings, evalset: str, taken_for: Mapping[int, tuple[int, int]]
) -> Table | None:
    """Every class of a set by its share of right answers, the weakest first.

    `taken_for` is class -> the other class that its images were most often given, and how often.
    """
    entries = found.set_results(evalset, found.subject).get("per_class")
    if not entries:
        return None
    has_precision = "average_precision" in entries[0]
    result = "average_precision" if has_precision else "share"
    own = ["average precision"] if has_precision else ["right", "share"]
    others = [] if has_precision else [words("most often taken for")]
    table = Table.of("class", "images", *own, *others)
    shown = [(one[result], index) for index, one in enumerate(entries) if one["n"]]
    for share, index in sorted(shown):
        one, bar = entries[index], Cell(format_percent(share), share=share)
        if has_precision:
            table.add(one["name"], f"{one['n']:,}", bar)
            continue
        other, count = taken_for.get(index, (None, 0))
        said = NOTHING if other is None else f"{entries[other]['name']} ({count:,})"
        table.add(one["name"], f"{one['n']:,}", f"{one['correct']:,}", bar, said)
    return table


def confusion_table(given: Sequence[Confusion], names: Sequence[str]) -> Table:
    table = Table.of("class", words("taken for"), "images of the class")
    for one in given:
        table.add(names[one.actual], names[one.said], f"{len(one.images):,} of {one.of:,}")
    return table


def provenance_table(found: Findings, evalset: str) -> Table:
    about, known = found.describe_set(evalset), found.known_set(evalset)
    table = Table.of("what", words("is"))
    size = f"{format_plural(about['n'], 'image')} in its index, all evaluated once"
    if about["expected_n"]:
        size += f"; the set that reproduces the paper has {about['expected_n']:,}"
    table.add("images", size)
    if about["split"]:
        is_unsure = known is not None and not known.split_stated
        note = " (split not stated by the paper)" if is_unsure else ""
        table.add("split", f"{about['split']}{note}")
    table.add("content", Cell(about["fingerprint"], "code"))
    table.add("names and prompts from", about["prompts_source"])
    table.add("prompts", _list_prompts(about["templates"]))
    table.add("texts", Cell(about["prompts_digest"], "code"))
    if known is not None:
        table.add("terms", known.licence)
        for trap in known.traps:
            table.add("beware", trap)
    return table


def _list_prompts(templates: Sequence[str]) -> str:
    if not templates:
        return "none: captions as they are"
    shown = ", ".join(f"“{one}”" for one in templates[:TEMPLATES_SHOWN])
    more = len(templates) - TEMPLATES_SHOWN
    return f"{len(templates)}: {shown}" + (f" and {more} more" if more > 0 else "")
