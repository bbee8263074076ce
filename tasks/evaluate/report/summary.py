"""What a reader in a hurry is told: a few figures and a few sentences.

Covers: the headline figures with their intervals, and the summary in words.
Not here: tables, layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import sqrt

from tasks.evaluate.metrics.metric import title_of
from tasks.evaluate.report.findings import Findings
from tasks.evaluate.report.numbers import interval, percent, plural, points, signed
from tasks.evaluate.report.overview import (
    SURE,
    TABLES,
    sets_and_images,
    verdict_counts,
)
from tasks.evaluate.sets.set_registry import known_sets

MOST_TILES = 8
SETS_IN_FULL = 3
"""Up to so many sets, every set has its own headline figures; beyond, tables' averages do."""


@dataclass(frozen=True)
class Tile:
    """One headline figure."""

    of: str
    value: str
    refused: bool = False
    """Whether the value is a reason why there is no figure."""
    facts: Sequence[tuple[str, str]] = field(default=())
    """What stands below it: (name, value)."""


def tiles(found: Findings) -> list[Tile]:
    """The headline figures: of every set when they are few, else of the paper's tables."""
    if len(found.sets) <= SETS_IN_FULL or not _tables(found):
        chosen = [*_set_tiles(found)]
    else:
        chosen = [*_set_tiles(found, only="imagenet1k"), *_average_tiles(found)]
        chosen += [tile for key in ("flickr30k", "coco") for tile in _set_tiles(found, only=key)]
    return chosen[:MOST_TILES]


def sentences(found: Findings) -> list[str]:
    """The evaluation in a few sentences: how much, whether it agrees, what to beware of."""
    return [*_extent(found), *_agreement(found), *_against_others(found), *_beware(found)]


def average_interval(found: Findings, table: str, model: str) -> tuple[float, float] | None:
    """95 % interval of a table's average, as a share: its sets' intervals, taken as independent.

    None when a set of the table was not evaluated or has no interval.
    """
    halves, values = [], []
    for key, known in known_sets().items():
        if table in known.tables:
            figures = found.figures(key, model)
            metric = known.metric
            spread = found.interval(key, model, metric) if figures else None
            value = found.share(key, model, metric) if figures else None
            if spread is None or value is None:
                return None
            halves.append((spread[1] - spread[0]) / 2)
            values.append(value)
    mean, half = sum(values) / len(values), sqrt(sum(h * h for h in halves)) / len(values)
    return max(0.0, mean - half), min(1.0, mean + half)


def _tables(found: Findings) -> list[str]:
    return [table for table in TABLES if found.average(table, found.subject)]


def _set_tiles(found: Findings, only: str | None = None) -> Iterator[Tile]:
    for evalset in found.sets:
        if only is not None and evalset != only:
            continue
        for metric in found.headlines(evalset):
            value = found.share(evalset, found.subject, metric)
            if value is None:
                continue
            spread = found.interval(evalset, found.subject, metric)
            published = found.published(evalset, found.subject, metric)
            chance = found.chance(evalset, metric)
            facts = [("95 % interval", interval(spread))] if spread else []
            if published is not None and published.value is not None:
                facts.append(("published", f"{100 * published.value:.1f} %"))
            for other in found.others[:2]:
                share = found.share(evalset, other, metric)
                facts += [(other, percent(share))] if share is not None else []
            facts += [("chance", percent(chance))] if chance is not None else []
            yield Tile(f"{found.name(evalset)} · {title_of(metric)}", percent(value), facts=facts)


def _average_tiles(found: Findings) -> Iterator[Tile]:
    for table in _tables(found):
        average = found.average(table, found.subject)
        assert average is not None
        value, missing = average.get("value"), average.get("missing") or ()
        reference = average.get("intersection_reference")
        facts: list[tuple[str, str]] = []
        if value is None:
            common = average.get("intersection_value")
            if common is not None:
                evaluated = len(average.get("sets") or ())
                facts.append((f"over {plural(evaluated, 'set')}", f"{common:.1f} %"))
            if reference is not None:
                facts.append(("published, same sets", f"{reference:.1f} %"))
            refused = f"no average: {plural(len(missing), 'set')} missing"
            yield Tile(f"Average of {TABLES[table]}", refused, True, facts)
            continue
        spread = average_interval(found, table, found.subject)
        facts += [("95 % interval", interval(spread))] if spread else []
        facts += [("published", f"{reference:.1f} %")] if reference is not None else []
        gap = found.robustness(found.subject) if table == "1b" else None
        if gap and gap.get("delta") is not None:
            facts.append(("gap Δ", points(gap["delta"])))
        yield Tile(f"Average of {TABLES[table]}", f"{value:.1f} %", facts=facts)


def _extent(found: Findings) -> Iterator[str]:
    about = found.about(found.subject)
    others = f", beside {', '.join(found.others)}" if found.others else ""
    model = f"{found.subject} ({about['architecture']})"
    yield f"{model} was evaluated on {sets_and_images(found)}{others}."
    if found.failed:
        names = ", ".join(found.name(one) for one in found.failed)
        yield f"{plural(len(found.failed), 'set')} could not be evaluated: {names}."


def _agreement(found: Findings) -> Iterator[str]:
    counts = verdict_counts(found, found.subject)
    total = sum(counts.values())
    if total:
        yield (
            f"Of {plural(total, 'figure')} that the paper prints too, "
            f"{counts['reproduced']} {_are(counts['reproduced'])} reproduced, "
            f"{counts['differs']} {'differs' if counts['differs'] == 1 else 'differ'} and "
            f"{counts['not comparable']} {_are(counts['not comparable'])} not comparable."
        )
    for table in _tables(found):
        average = found.average(table, found.subject) or {}
        value, reference = average.get("value"), average.get("intersection_reference")
        if value is not None and reference is not None:
            unlike = _not_comparable(found, table)
            beside = (
                f"though {unlike} of its figures {_are(unlike)} not comparable"
                if unlike
                else f"a difference of {signed(value - reference)}"
            )
            yield (
                f"The average over {TABLES[table]} is {value:.1f} %, published {reference:.1f} %, "
                f"{beside}."
            )
        elif value is not None:
            yield f"The average over {TABLES[table]} is {value:.1f} %."
        elif average.get("missing"):
            yield (
                f"There is no average over {TABLES[table]}: "
                f"{plural(len(average['missing']), 'set')} of it "
                f"{_are(len(average['missing']))} missing."
            )


def _not_comparable(found: Findings, table: str) -> int:
    """How many of the subject's figures in a table's average cannot be held against the paper's."""
    given = [
        found.published(key, found.subject, known.metric)
        for key, known in known_sets().items()
        if table in known.tables
    ]
    return sum(one is not None and one.verdict == "not comparable" for one in given)


def _against_others(found: Findings) -> Iterator[str]:
    for other in found.others:
        tests = [
            one
            for evalset in found.sets
            for metric, one in found.paired(evalset).get(other, {}).items()
            if metric in found.headlines(evalset)
        ]
        sure = [one for one in tests if one.get("p") is not None and one["p"] < SURE]
        better = sum(one["difference"] > 0 for one in sure)
        if tests and not sure:
            yield (
                f"Beside {other}, {found.subject} cannot be told apart on any of "
                f"{plural(len(tests), 'headline figure')} (paired tests, p < {SURE})."
            )
        elif tests:
            yield (
                f"Beside {other}, {found.subject} is better on {better} and worse on "
                f"{len(sure) - better} of {plural(len(tests), 'headline figure')} (paired tests, "
                f"p < {SURE}); the others cannot be told apart."
            )


def _beware(found: Findings) -> Iterator[str]:
    flagged = [
        (one, int(about["flagged"]))
        for one in found.sets
        if (about := found.contamination(one)) and about["flagged"]
    ]
    if flagged:
        worst = max(flagged, key=lambda item: item[1] / int(found.set(item[0])["n"]))
        yield (
            f"{plural(len(flagged), 'set')} {'has' if len(flagged) == 1 else 'have'} images with "
            f"near-duplicates in the training data, most of all {found.name(worst[0])} "
            f"({percent(worst[1] / int(found.set(worst[0])['n']))})."
        )
    warned = [one for one in found.sets if found.set(one)["warnings"]]
    if warned:
        texts = plural(sum(len(found.set(one)["warnings"]) for one in warned), "warning")
        yield f"{plural(len(warned), 'set')} {_come(len(warned))} with {texts}: read them first."


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _come(count: int) -> str:
    return "comes" if count == 1 else "come"
