"""The evaluation for a reader in a hurry: a few figures and a few sentences."""

from collections.abc import Iterator, Sequence
from math import sqrt
from typing import NamedTuple

from tasks.evaluate.paper.published import members_of
from tasks.evaluate.report.findings import Figure, Findings
from tasks.evaluate.report.numbers import format_interval, format_percent, format_points
from tasks.evaluate.report.tables import (
    SURE,
    TABLES,
    compared_pairs,
    count_sets_and_images,
    count_verdicts,
)
from tasks.evaluate.report.templates import TEMPLATES

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
    """The evaluation in sentences; what they say is in `sentences.txt.j2`."""
    averages, others, seen = [], [], []
    for table, title in TABLES.items():
        if average := found.table_average(table, found.subject):
            verdicts = [
                one.paper.get("verdict") for one in _paper_figures(found, table, found.subject)
            ]
            averages.append(
                {
                    "title": title,
                    "value": average["value"],
                    "reference": average["intersection_reference"],
                    "unlike": verdicts.count("not comparable"),
                    "missing": len(average["missing"]),
                    # others were not asked for
                    "has_failed": bool(found.failed.keys() & set(average["missing"])),
                }
            )
    for other in found.others:
        tests = [one for *_, one in compared_pairs(found, other, headlines_only=True)]
        sure = [one["difference"] > 0 for one in tests if one["p"] < SURE]
        better, worse = sure.count(True), sure.count(False)
        others.append({"name": other, "tests": len(tests), "better": better, "worse": worse})
    for key in found.sets:
        if flagged := found.contaminated_images(key).get("flagged", 0):
            seen.append((flagged / found.describe_set(key)["n"], found.set_name(key)))
    seen.sort(key=lambda pair: -pair[0])
    said = TEMPLATES.get_template("sentences.txt.j2").render(
        found=found,
        about=found.describe_model(found.subject),
        extent=count_sets_and_images(found),
        failed=[found.set_name(one) for one in found.failed],
        counts=count_verdicts(found, found.subject),
        averages=averages,
        others=others,
        sure=str(SURE),
        seen=[{"name": name, "share": format_percent(share)} for share, name in seen],
        warnings=[n for key in found.sets if (n := len(found.describe_set(key)["warnings"]))],
    )
    return said.strip().split("\n")


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
        if (theirs := found.set_results(figure.evalset, other).get(figure.metric)) is not None:
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
