"""The evaluation for a reader in a hurry: a few figures and a few sentences."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import sqrt

from tasks.evaluate.paper.published import members_of
from tasks.evaluate.report.findings import Figure, Findings
from tasks.evaluate.report.numbers import (
    format_interval,
    format_percent,
    format_plural,
    format_points,
    format_signed,
)
from tasks.evaluate.report.tables import (
    SURE,
    TABLES,
    compared_pairs,
    count_sets_and_images,
    count_verdicts,
)

MOST_TILES = 8
SETS_IN_FULL = 3
"""Up to so many sets, every set has its own headline figures; beyond, tables' averages do."""
OTHERS_IN_TILES = 2


@dataclass(frozen=True)
class Tile:
    of: str
    value: str
    facts: Sequence[tuple[str, str]] = field(default=())
    """Name and value of what stands below it."""


def headline_tiles(found: Findings) -> list[Tile]:
    """The headline figures: of every set when they are few, else of the paper's tables that are
    whole."""
    tables = [one for one in _list_tables(found) if not _missing_sets(found, one)]
    if len(found.sets) <= SETS_IN_FULL or not tables:
        return _set_tiles(found, found.sets)[:MOST_TILES]
    first, last = (
        _set_tiles(found, [key for key in keys if key in found.sets])
        for keys in (("imagenet1k",), ("flickr30k", "coco"))
    )
    averages = [_average_tile(found, table) for table in tables]
    return [*first, *averages, *last][:MOST_TILES]


def summary_sentences(found: Findings) -> list[str]:
    return [
        *_extent_lines(found),
        *_agreement_lines(found),
        *_against_others(found),
        *_warning_lines(found),
    ]


def average_interval(found: Findings, table: str, model: str) -> tuple[float, float] | None:
    """95 % interval of a table's average, as a share: its sets' intervals, taken as independent.

    None when a set of the table was not evaluated, and for DataComp's.
    """
    figures = [
        found.get_figure(key, model, known.metric) for key, known in members_of(table).items()
    ]
    given = [(one.value, one.interval) for one in figures]
    known = [(value, spread) for value, spread in given if value is not None and spread]
    if not known or len(known) < len(given):
        return None
    mean = sum(value for value, _ in known) / len(known)
    half = sqrt(sum(((high - low) / 2) ** 2 for _, (low, high) in known)) / len(known)
    return max(0.0, mean - half), min(1.0, mean + half)


def _list_tables(found: Findings) -> list[str]:
    return [table for table in TABLES if found.table_average(table, found.subject)]


def _missing_sets(found: Findings, table: str) -> Sequence[str]:
    missing: Sequence[str] = found.table_average(table, found.subject)["missing"]
    return missing


def _set_tiles(found: Findings, sets: Sequence[str]) -> list[Tile]:
    figures = [one for key in sets for one in found.headline_figures(key, found.subject)]
    return [
        Tile(
            f"{found.set_name(one.evalset)} · {one.title}",
            format_percent(one.value),
            facts=[*_list_facts(found, one)],
        )
        for one in figures
        if one.value is not None
    ]


def _list_facts(found: Findings, figure: Figure) -> Iterator[tuple[str, str]]:
    if figure.interval:
        yield "95 % interval", format_interval(figure.interval)
    if figure.published:
        yield "published", f"{100 * figure.published.value:.1f} %"
    for other in found.others[:OTHERS_IN_TILES]:
        theirs = found.get_figure(figure.evalset, other, figure.metric)
        if theirs.value is not None:
            yield other, format_percent(theirs.value)
    if figure.chance is not None:
        yield "chance", format_percent(figure.chance)


def _average_tile(found: Findings, table: str) -> Tile:
    average, title = found.table_average(table, found.subject), f"Average of {TABLES[table]}"
    value, reference = average["value"], average["intersection_reference"]
    facts: list[tuple[str, str]] = []
    spread = average_interval(found, table, found.subject)
    facts += [("95 % interval", format_interval(spread))] if spread else []
    facts += [("published", f"{reference:.1f} %")] if reference is not None else []
    delta = average["delta"]
    facts += [("gap Δ", format_points(delta))] if delta is not None else []
    return Tile(title, f"{value:.1f} %", facts=facts)


def _extent_lines(found: Findings) -> Iterator[str]:
    others = f", beside {', '.join(found.others)}" if found.others else ""
    model = f"{found.subject} ({found.describe_model(found.subject)['architecture']})"
    yield f"{model} was evaluated on {count_sets_and_images(found)}{others}."
    if found.failed:
        names = ", ".join(found.set_name(one) for one in found.failed)
        yield f"{format_plural(len(found.failed), 'set')} could not be evaluated: {names}."


def _agreement_lines(found: Findings) -> Iterator[str]:
    counts = count_verdicts(found, found.subject)
    same, other, unlike = (counts[one] for one in ("reproduced", "differs", "not comparable"))
    if same + other + unlike:
        yield (
            f"Of {format_plural(same + other + unlike, 'figure')} that the paper prints too, "
            f"{same} {_is_or_are(same)} reproduced, "
            f"{other} {'differs' if other == 1 else 'differ'} and "
            f"{unlike} {_is_or_are(unlike)} not comparable."
        )
    for table in _list_tables(found):
        average = found.table_average(table, found.subject)
        value, reference = average["value"], average["intersection_reference"]
        missing = _missing_sets(found, table)
        if value is not None and reference is not None:
            unlike = _count_not_comparable(found, table)
            beside = (
                f"though {unlike} of its figures {_is_or_are(unlike)} not comparable"
                if unlike
                else f"a difference of {format_signed(value - reference)}"
            )
            yield (
                f"The average over {TABLES[table]} is {value:.1f} %, published {reference:.1f} %, "
                f"{beside}."
            )
        elif value is not None:
            yield f"The average over {TABLES[table]} is {value:.1f} %."
        elif found.failed.keys() & set(missing):  # others were not asked for
            yield (
                f"There is no average over {TABLES[table]}: {format_plural(len(missing), 'set')} "
                f"of it {_is_or_are(len(missing))} missing."
            )


def _count_not_comparable(found: Findings, table: str) -> int:
    given = [
        found.get_figure(key, found.subject, known.metric).published
        for key, known in members_of(table).items()
    ]
    return sum(one is not None and one.verdict == "not comparable" for one in given)


def _against_others(found: Findings) -> Iterator[str]:
    for other in found.others:
        tests = [one for *_, one in compared_pairs(found, other, headlines_only=True)]
        sure = [one for one in tests if one["p"] < SURE]
        better = sum(one["difference"] > 0 for one in sure)
        if tests and not sure:
            yield (
                f"Beside {other}, {found.subject} cannot be told apart on any of "
                f"{format_plural(len(tests), 'headline figure')} (paired tests, p < {SURE})."
            )
        elif tests:
            yield (
                f"Beside {other}, {found.subject} is better on {better} and worse on "
                f"{len(sure) - better} of {format_plural(len(tests), 'headline figure')} "
                f"(paired tests, p < {SURE}); the others cannot be told apart."
            )


def _warning_lines(found: Findings) -> Iterator[str]:
    shares = {
        one: found.contaminated_images(one).get("flagged", 0) / found.describe_set(one)["n"]
        for one in found.sets
    }
    flagged = [one for one, share in shares.items() if share]
    if flagged:
        worst = max(flagged, key=lambda one: shares[one])
        yield (
            f"{format_plural(len(flagged), 'set')} {'has' if len(flagged) == 1 else 'have'} images "
            f"with near-duplicates in the training data, most of all {found.set_name(worst)} "
            f"({format_percent(shares[worst])})."
        )
    counts = [len(found.describe_set(one)["warnings"]) for one in found.sets]
    warned = sum(map(bool, counts))
    if warned:
        come, count = "comes" if warned == 1 else "come", format_plural(sum(counts), "warning")
        yield f"{format_plural(warned, 'set')} {come} with {count}: read them first."


def _is_or_are(count: int) -> str:
    return "is" if count == 1 else "are"
