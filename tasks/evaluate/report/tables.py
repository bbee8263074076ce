"""Tables of the report: over all sets, and of one set."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import sqrt
from typing import Any

from tasks.evaluate.paper.published import members_of
from tasks.evaluate.report.findings import Figure, Findings
from tasks.evaluate.report.numbers import (
    format_interval,
    format_percent,
    format_plural,
    format_points,
    format_signed,
    p_value,
)
from tasks.evaluate.report.templates import MACROS
from tasks.evaluate.sets.set_registry import DATACOMP, find_set
from tasks.table import NOTHING, Cell, Table, TableColumn, words

VERDICTS = ("differs", "not comparable", "reproduced")
"""In the order of the table: what needs to be looked at first."""
EMPHASIS = {"reproduced": "good", "differs": "bad", "not comparable": "quiet"}
TABLES = {
    "1b": "ImageNet, its variants and ObjectNet (Table 1b)",
    "2": "27 image classification sets (Table 2)",
    "3": "four video sets (Table 3)",
    DATACOMP: "DataComp's 38 sets, the main figure of each",
}
"""Tables of the paper that have an average, and DataComp's."""
TEMPLATES_SHOWN = 4
SURE = 0.05
"""p-value below which a difference is coloured."""


def set_anchor(evalset: str) -> str:
    return f"set-{evalset}"


def glance_table(found: Findings) -> Table:
    """One row a set, two of retrieval: our figure beside the published one and chance.

    It is top-1 unless the row says otherwise.
    """
    table = Table.of(
        *("set", found.subject, "95 % interval", TableColumn("0 … 100 %", is_drawn=True)),
        *("published", "difference", words("verdict")),
        *(*found.others, "chance", "images", "warnings"),
    )
    for one in (one for key in found.sets for one in found.headline_figures(key)):
        about = found.describe_set(one.evalset)
        warnings = len(about["warnings"])
        table.add(
            _link_figure(found, one),
            Cell(format_percent(one.value), "value"),
            format_interval(one.interval),
            Cell(
                "",
                drawing=None  # a figure that is missing is not one of 0
                if one.value is None
                else MACROS.interval_bar(
                    one.value, one.interval, one.paper.get("published"), one.chance
                ),
            ),
            *(_published_cell(one, table), format_signed(one.difference), _verdict_cell(one)),
            *_list_percents(found, one.evalset, one.metric, found.others),
            format_percent(one.chance),
            f"{about['n']:,}",
            Cell(str(warnings), "warned", link=set_anchor(one.evalset)) if warnings else "",
        )
    return table


def verdict_table(found: Findings) -> Table:
    """Every figure of ours that the paper prints too; the ones that differ first."""
    compared = [
        (VERDICTS.index(one.paper["verdict"]), model, one)
        for model in found.models
        for one in compared_figures(found, model)
    ]
    several = len({model for _, model, _ in compared}) > 1
    table = Table.of(
        *("set", words("model"), words("verdict"), "ours", "published", "difference"),
        *("tolerance", words("why")),
    )
    # Footnotes are numbered in the order of models and sets, which the order of rows is not.
    table.cite(note for _, _, one in compared for note in one.paper["errata"])
    for _, model, one in sorted(compared, key=lambda entry: entry[0]):
        tolerance = one.paper["tolerance"]
        table.add(
            _link_figure(found, one),
            model if several else "",
            _verdict_cell(one),
            format_percent(one.value),
            _published_cell(one, table),
            format_signed(one.difference, 2),
            NOTHING if tolerance is None else f"± {tolerance:g}",
            one.paper["reason"] or "within the tolerance",
        )
    return table


def compared_figures(found: Findings, model: str) -> list[Figure]:
    return [one for key in found.sets for one in found.list_figures(key, model) if one.paper]


def count_verdicts(found: Findings, model: str) -> Counter[str]:
    return Counter(one.paper["verdict"] for one in compared_figures(found, model))


def average_table(found: Findings) -> Table:
    """The paper's averages; where a set is missing there is none, but one over what is there."""
    table = Table.of(
        *("average over", words("model"), "average", "95 % interval", "sets"),
        *("over the sets both have", "published, same sets", "difference"),
    )
    for key, title in TABLES.items():
        for model in found.models:
            if not (average := found.table_average(key, model)):
                continue
            common, reference = average["intersection_value"], average["intersection_reference"]
            sets = len(average["sets"])
            table.add(
                title,
                model,
                Cell("refused", "bad", notes=table.cite([average["reason"]]))
                if average["value"] is None
                else format_points(average["value"]),
                format_interval(average_interval(found, key, model)),
                f"{sets} of {sets + len(average['missing'])}",
                format_points(common),
                format_points(reference),
                format_signed(common - reference) if None not in (common, reference) else NOTHING,
            )
    return table


def average_interval(found: Findings, table: str, model: str) -> tuple[float, float] | None:
    """95 % interval of a table's average, as a share: its sets' intervals, taken as independent.

    None when a set of the table was not evaluated, and for DataComp's.
    """
    figures = list_averaged(found, table, model)
    given = [(x.value, x.interval) for x in figures if x.value is not None and x.interval]
    if not given or len(given) < len(figures):
        return None
    mean = sum(value for value, _ in given) / len(given)
    half = sqrt(sum(((high - low) / 2) ** 2 for _, (low, high) in given)) / len(given)
    return max(0.0, mean - half), min(1.0, mean + half)


def list_averaged(found: Findings, table: str, model: str) -> list[Figure]:
    """A model's figures that a table of the paper averages."""
    members = members_of(table).items()
    return [found.get_figure(key, model, known.metric) for key, known in members]


def comparison_table(found: Findings, *, headlines_only: bool) -> Table:
    table = Table.of(
        *("set", words("other model"), words("figure"), found.subject, "other"),
        *("difference, points", "95 % interval", "p"),
    )
    for other in found.others:
        for evalset, metric, one in compared_pairs(found, other, headlines_only=headlines_only):
            low, high = (format_signed(100 * bound, 2) for bound in one["interval"])
            is_sure = one["p"] < SURE
            direction = "good" if one["difference"] > 0 else "bad"
            table.add(
                _link_set(found, evalset),
                other,
                found.metric_title(metric),
                *_list_percents(found, evalset, metric, (found.subject, other)),
                Cell(format_signed(100 * one["difference"], 2), direction if is_sure else "quiet"),
                f"{low} … {high}",
                Cell(p_value(one["p"]), "" if is_sure else "quiet"),
            )
    return table


def compared_pairs(
    found: Findings, other: str, *, headlines_only: bool
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for evalset in found.sets:
        for metric, one in found.paired_differences(evalset, other).items():
            if not headlines_only or metric in found.headline_metrics(evalset):
                yield evalset, metric, one


def contamination_table(found: Findings) -> Table:
    table = Table.of(
        *("set", "images seen in training", "share", words("figure"), "with them"),
        *("without them", "difference"),
    )
    for evalset in found.sets:
        if not (one := found.contaminated_images(evalset)):
            continue
        flagged, n = one["flagged"], found.describe_set(evalset)["n"]
        for figure in found.headline_figures(evalset):
            ours, cleaned = figure.value, (one["figures_without"] or {}).get(figure.metric)
            table.add(
                _link_set(found, evalset),
                f"{flagged:,} of {n:,}",
                format_percent(flagged / n),
                figure.title,
                *(format_percent(ours), format_percent(cleaned)),
                NOTHING
                if ours is None or cleaned is None
                else format_signed(100 * (cleaned - ours), 2),
            )
    return table


def failure_table(found: Findings) -> Table:
    table = Table.of("set", words("why"))
    for evalset, reason in found.failed.items():
        table.add(found.set_name(evalset), reason)
    return table


def provenance_table(found: Findings) -> Table:
    table = Table.of("what", words("is"))
    for model in found.models:
        table.add(f"model “{model}”", "; ".join(_describe_model(found.describe_model(model))))
    table.add("rule", str(found.raw["rule"]))
    versions = found.raw["versions"].items()
    table.add("versions", ", ".join(f"{tool} {version}" for tool, version in versions))
    return table


def count_sets_and_images(found: Findings) -> str:
    """Size of the evaluation: 33 sets, 512,000 images."""
    images = sum(int(found.describe_set(one)["n"]) for one in found.sets)
    return f"{format_plural(len(found.sets), 'set')}, {format_plural(images, 'image')}"


def figure_table(found: Findings, evalset: str) -> Table:
    """Every figure of the subject on a set, beside the other models and chance."""
    table = Table.of(
        "metric", found.subject, "95 % interval", "under ties", *found.others, "chance"
    )
    for one in found.list_figures(evalset, found.subject):
        is_tied = one.bounds is not None and one.bounds[0] != one.bounds[1]
        table.add(
            one.title,
            Cell(format_percent(one.value), "value"),
            format_interval(one.interval),
            format_interval(one.bounds) if is_tied else "",
            *_list_percents(found, evalset, one.metric, found.others),
            format_percent(one.chance),
        )
    return table


def class_table(found: Findings, evalset: str, taken_for: Mapping[int, tuple[int, int]]) -> Table:
    """Every class of a set by its share of right answers, the weakest first.

    `taken_for` is class -> the other class that its images were most often given, and how often.
    """
    entries = found.set_results(evalset, found.subject).get("per_class", [])
    result = "average_precision" if entries and "correct" not in entries[0] else "share"
    title = result.replace("_", " ")
    table = Table.of("class", "images", "right", title, words("most often taken for"))
    shown = [(one[result], index) for index, one in enumerate(entries) if one["n"]]
    for share, index in sorted(shown):
        one, (other, count) = entries[index], taken_for.get(index, (None, 0))
        table.add(
            *(one["name"], f"{one['n']:,}", f"{one['correct']:,}" if "correct" in one else ""),
            Cell(format_percent(share), share=share),
            NOTHING if other is None else f"{entries[other]['name']} ({count:,})",
        )
    return table


def set_provenance_table(found: Findings, evalset: str) -> Table:
    about, known = found.describe_set(evalset), find_set(evalset)
    table = Table.of("what", words("is"))
    size = f"{format_plural(about['n'], 'image')} in its index, all evaluated once"
    if about["expected_n"]:
        size += f"; the set that reproduces the paper has {about['expected_n']:,}"
    table.add("images", size)
    if about["split"]:
        is_unsure = known is not None and not known.split_stated
        table.add("split", about["split"] + " (split not stated by the paper)" * is_unsure)
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


def _describe_model(about: Mapping[str, Any]) -> Iterator[str]:
    yield str(about["architecture"])
    yield f"weights {about['digest']}"
    yield f"text tower {about['text_digest']}"
    yield f"preprocessing {about['transform_digest']}"
    yield f"{about['params'] / 1e6:,.1f} million parameters"
    if about["gflops"]:
        yield f"{about['gflops']:,.1f} GFLOPs an image"
    if settings := about["preprocessing"].items():
        yield f"images: {', '.join(f'{name} {_describe_value(value)}' for name, value in settings)}"
    if about["source"]:
        yield f"from {about['source']}"


def _describe_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " ".join(map(_describe_value, value))
    return str(value)


def _link_set(found: Findings, evalset: str) -> Cell:
    return Cell(found.set_name(evalset), link=set_anchor(evalset))


def _link_figure(found: Findings, figure: Figure) -> Cell:
    """A set and its figure in one name, of top-1 the set's alone, that leads to its section."""
    title = "" if figure.metric == "top1" else f" · {figure.title}"
    return Cell(found.set_name(figure.evalset) + title, link=set_anchor(figure.evalset))


def _list_percents(found: Findings, evalset: str, metric: str, models: Iterable[str]) -> list[str]:
    return [format_percent(found.set_results(evalset, one).get(metric)) for one in models]


def _verdict_cell(figure: Figure) -> Cell:
    verdict = figure.paper.get("verdict", NOTHING)
    return Cell(verdict, EMPHASIS.get(verdict, ""))


def _published_cell(figure: Figure, table: Table) -> Cell:
    if not figure.paper:
        return Cell(NOTHING)
    notes = table.cite(figure.paper["errata"])
    return Cell(f"{100 * figure.paper['published']:.1f} %", notes=notes)
