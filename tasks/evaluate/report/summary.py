"""The evaluation for a reader in a hurry: a few figures and a few sentences."""

from collections.abc import Iterator, Sequence
from math import sqrt
from typing import NamedTuple

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


class Tile(NamedTuple):
    of: str
    value: str
    facts: Sequence[tuple[str, str]]
    """Name and value of what stands below it."""


def headline_tiles(found: Findings) -> list[Tile]:
    """The headline figures: of every set when they are few, else of the paper's tables that are
    whole."""
    whole = [
        table
        for table in TABLES
        if (average := found.table_average(table, found.subject)) and not average["missing"]
    ]
    if len(found.sets) <= SETS_IN_FULL or not whole:
        return _set_tiles(found, found.sets)[:MOST_TILES]
    first, last = (
        _set_tiles(found, [key for key in keys if key in found.sets])
        for keys in (("imagenet1k",), ("flickr30k", "coco"))
    )
    return [*first, *(_average_tile(found, table) for table in whole), *last][:MOST_TILES]


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
    figures = _paper_figures(found, table, model)
    given = [(x.value, x.interval) for x in figures if x.value is not None and x.interval]
    if not given or len(given) < len(figures):
        return None
    mean = sum(value for value, _ in given) / len(given)
    half = sqrt(sum(((high - low) / 2) ** 2 for _, (low, high) in given)) / len(given)
    return max(0.0, mean - half), min(1.0, mean + half)


def _paper_figures(found: Findings, table: str, model: str) -> list[Figure]:
    """A model's figures that a table of the paper averages."""
    members = members_of(table).items()
    return [found.get_figure(key, model, known.metric) for key, known in members]


def _set_tiles(found: Findings, sets: Sequence[str]) -> list[Tile]:
    return [
        Tile(
            f"{found.set_name(one.evalset)} · {one.title}",
            format_percent(one.value),
            [*_list_facts(found, one)],
        )
        for key in sets
        for one in found.headline_figures(key)
        if one.value is not None
    ]


def _list_facts(found: Findings, figure: Figure) -> Iterator[tuple[str, str]]:
    if figure.interval:
        yield "95 % interval", format_interval(figure.interval)
    if figure.paper:
        yield "published", f"{100 * figure.paper['published']:.1f} %"
    for other in found.others[:OTHERS_IN_TILES]:
        theirs = found.set_results(figure.evalset, other).get(figure.metric)
        if theirs is not None:
            yield other, format_percent(theirs)
    if figure.chance is not None:
        yield "chance", format_percent(figure.chance)


def _average_tile(found: Findings, table: str) -> Tile:
    average = found.table_average(table, found.subject)
    facts: list[tuple[str, str]] = []
    if spread := average_interval(found, table, found.subject):
        facts.append(("95 % interval", format_interval(spread)))
    if (reference := average["intersection_reference"]) is not None:
        facts.append(("published", f"{reference:.1f} %"))
    if average["delta"] is not None:
        facts.append(("gap Δ", format_points(average["delta"])))
    return Tile(f"Average of {TABLES[table]}", f"{average['value']:.1f} %", facts)


def _extent_lines(found: Findings) -> Iterator[str]:
    others = f", beside {', '.join(found.others)}" if found.others else ""
    model = f"{found.subject} ({found.describe_model(found.subject)['architecture']})"
    yield f"{model} was evaluated on {count_sets_and_images(found)}{others}."
    if found.failed:
        names = ", ".join(found.set_name(one) for one in found.failed)
        yield f"{format_plural(len(found.failed), 'set')} could not be evaluated: {names}."


def _agreement_lines(found: Findings) -> Iterator[str]:
    counts = count_verdicts(found, found.subject)
    if counts:
        same, other = counts["reproduced"], counts["differs"]
        yield (
            f"Of {format_plural(counts.total(), 'figure')} that the paper prints too, "
            f"{same} {_is_or_are(same)} reproduced, {other} {'differs' if other == 1 else 'differ'}"
            f" and {_not_comparable(counts['not comparable'])}."
        )
    for table, title in TABLES.items():
        if not (average := found.table_average(table, found.subject)):
            continue
        value, reference = average["value"], average["intersection_reference"]
        missing = average["missing"]
        if value is not None and reference is not None:
            figures = _paper_figures(found, table, found.subject)
            unlike = [one for one in figures if one.paper.get("verdict") == "not comparable"]
            beside = (
                f"though {_not_comparable(len(unlike), ' of its figures')}"
                if unlike
                else f"a difference of {format_signed(value - reference)}"
            )
            yield (
                f"The average over {title} is {value:.1f} %, published {reference:.1f} %, {beside}."
            )
        elif value is not None:
            yield f"The average over {title} is {value:.1f} %."
        elif found.failed.keys() & set(missing):  # others were not asked for
            yield (
                f"There is no average over {title}: {format_plural(len(missing), 'set')} "
                f"of it {_is_or_are(len(missing))} missing."
            )


def _against_others(found: Findings) -> Iterator[str]:
    for other in found.others:
        tests = [one for *_, one in compared_pairs(found, other, headlines_only=True)]
        sure = [one for one in tests if one["p"] < SURE]
        better = sum(one["difference"] > 0 for one in sure)
        figures, test = format_plural(len(tests), "headline figure"), f"(paired tests, p < {SURE})"
        if sure:
            yield (
                f"Beside {other}, {found.subject} is better on {better} and worse on "
                f"{len(sure) - better} of {figures} {test}; the others cannot be told apart."
            )
        elif tests:
            yield (
                f"Beside {other}, {found.subject} cannot be told apart on any of {figures} {test}."
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
    if warned := sum(map(bool, counts)):
        come, count = "comes" if warned == 1 else "come", format_plural(sum(counts), "warning")
        yield f"{format_plural(warned, 'set')} {come} with {count}: read them first."


def _not_comparable(count: int, of: str = "") -> str:
    return f"{count}{of} {_is_or_are(count)} not comparable"


def _is_or_are(count: int) -> str:
    return "is" if count == 1 else "are"
