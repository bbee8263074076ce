"""Tables over all sets: the figures at a glance, verdicts, averages, comparisons.

Covers: what stands in them, in the words of a reader.
Not here: the paper's tables (paper_form.py), tables of one set (set_tables.py), layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tasks.evaluate.metrics.metric import title_of
from tasks.evaluate.report.charts import interval_bar
from tasks.evaluate.report.findings import Findings, Published
from tasks.evaluate.report.numbers import (
    NOTHING,
    interval,
    p_value,
    percent,
    plural,
    points,
    signed,
)
from tasks.evaluate.report.tables import Cell, Footnotes, Row, Table, row

VERDICTS = ("reproduced", "differs", "not comparable")
STYLES = {"reproduced": "good", "differs": "bad", "not comparable": "quiet"}
TABLES = {
    "1b": "ImageNet, its variants and ObjectNet (Table 1b)",
    "2": "27 image classification sets (Table 2)",
    "3": "four video sets (Table 3)",
}
"""Tables of the paper that have an average."""


def anchor(evalset: str) -> str:
    """Anchor of a set's section on the page."""
    return f"set-{evalset}"


def at_a_glance(found: Findings) -> Table:
    """One row a set, two of retrieval: our figure beside the published one and chance.

    It is top-1 unless the row says otherwise.
    """
    notes = Footnotes()
    with_paper = any(_published(found, one) for one in found.sets)
    head = ["set", found.subject, "95 % interval", "0 … 100 %"]
    head += ["published", "difference", "verdict"] if with_paper else []
    head += [*found.others, "chance", "images", "warnings"]
    rows = []
    for evalset in found.sets:
        for metric in found.headlines(evalset):
            rows.append(row(*_glance(found, evalset, metric, notes, with_paper)))
    words = frozenset({6} if with_paper else ())
    return Table(tuple(head), tuple(rows), tuple(notes.texts), words, frozenset({3}))


def verdicts(found: Findings) -> Table | None:
    """Every figure of ours that the paper prints too; the ones that differ first."""
    notes = Footnotes()
    rows: list[tuple[int, Row]] = []
    several = sum(any(_compared(found, model)) for model in found.models) > 1
    for model in found.models:
        for evalset, metric, published in _compared(found, model):
            ours = found.share(evalset, model, metric)
            difference = _difference(ours, published)
            rows.append(
                (
                    ("differs", "not comparable", "reproduced").index(published.verdict),
                    row(
                        Cell(_figure(found, evalset, metric), link=anchor(evalset)),
                        *([model] if several else []),
                        Cell(published.verdict, STYLES[published.verdict]),
                        NOTHING if ours is None else percent(ours),
                        _published_cell(published, notes),
                        signed(difference, 2),
                        NOTHING if published.tolerance is None else f"± {published.tolerance:g}",
                        published.reason or "within the tolerance",
                    ),
                )
            )
    if not rows:
        return None
    head = ["set", *(["model"] if several else []), "verdict", "ours", "published"]
    head += ["difference", "tolerance", "why"]
    words = {head.index(name) for name in ("model", "verdict", "why") if name in head}
    ordered = tuple(one for _, one in sorted(rows, key=lambda item: item[0]))
    return Table(tuple(head), ordered, tuple(notes.texts), frozenset(words))


def verdict_counts(found: Findings, model: str) -> Mapping[str, int]:
    """How many of a model's figures that the paper prints too have each verdict."""
    given = [published.verdict for _, _, published in _compared(found, model)]
    return {verdict: given.count(verdict) for verdict in VERDICTS}


def averages(found: Findings) -> Table | None:
    """The paper's averages; where a set is missing there is none, but one over what is there."""
    notes = Footnotes()
    rows = []
    for table, title in TABLES.items():
        for model in found.models:
            average = found.average(table, model)
            if average is None:
                continue
            value, common = average.get("value"), average.get("intersection_value")
            reference = average.get("intersection_reference")
            sets, missing = average.get("sets") or (), average.get("missing") or ()
            why = notes.numbers([str(average["reason"])] if average.get("reason") else [])
            rows.append(
                row(
                    title,
                    model,
                    Cell("refused", "bad", notes=why) if value is None else f"{value:.1f}",
                    f"{len(sets)} of {len(sets) + len(missing)}",
                    points(common),
                    points(reference),
                    NOTHING if common is None or reference is None else signed(common - reference),
                )
            )
    if not rows:
        return None
    head = ("average over", "model", "average", "sets", "over the sets both have")
    return Table(
        (*head, "published, same sets", "difference"),
        tuple(rows),
        tuple(notes.texts),
        frozenset({1}),
    )


def robustness(found: Findings) -> Table | None:
    """The gap Δ of Table 1b for every model that has it."""
    rows = []
    notes = Footnotes()
    for model in found.models:
        gap = found.robustness(model)
        if gap is None:
            continue
        delta, published = gap.get("delta"), gap.get("published")
        why = notes.numbers([str(gap["reason"])] if gap.get("reason") else [])
        rows.append(
            row(
                model,
                points(gap.get("imagenet1k")),
                points(gap.get("average")),
                Cell("refused", "bad", notes=why) if delta is None else points(delta),
                points(published),
            )
        )
    head = ("model", "ImageNet-1K", "average of the six", "gap Δ", "published Δ")
    return Table(head, tuple(rows), tuple(notes.texts)) if rows else None


def comparisons(found: Findings, *, headlines_only: bool) -> Table | None:
    """Differences to every other model on the same samples, with p-values."""
    rows = []
    for other in found.others:
        rows += list(_against(found, other, headlines_only))
    if not rows:
        return None
    head = ("set", "other model", "figure", found.subject, "other", "difference, points")
    return Table((*head, "95 % interval", "p"), tuple(rows), text_columns=frozenset({1, 2}))


def contamination(found: Findings) -> Table | None:
    """Figures with and without the images that have near-duplicates in the training shards."""
    rows = []
    for evalset in found.sets:
        one = found.contamination(evalset)
        if one is None:
            continue
        flagged, n = int(one["flagged"]), int(found.set(evalset)["n"])
        without = one.get("figures_without") or {}
        for metric in found.headlines(evalset):
            ours, cleaned = found.share(evalset, found.subject, metric), without.get(metric)
            rows.append(
                row(
                    Cell(found.name(evalset), link=anchor(evalset)),
                    f"{flagged:,} of {n:,}",
                    percent(flagged / n),
                    title_of(metric),
                    NOTHING if ours is None else percent(ours),
                    NOTHING if cleaned is None else percent(float(cleaned)),
                    NOTHING
                    if ours is None or cleaned is None
                    else signed(100 * (float(cleaned) - ours), 2),
                )
            )
    head = ("set", "images seen in training", "share", "figure", "with them", "without them")
    return Table((*head, "difference"), tuple(rows), text_columns=frozenset({3})) if rows else None


def failures(found: Findings) -> Table | None:
    """Sets that could not be evaluated."""
    rows = [row(found.name(one), reason) for one, reason in found.failed.items()]
    return Table(("set", "why"), tuple(rows), text_columns=frozenset({1})) if rows else None


def provenance(found: Findings) -> Table:
    """What the figures rest on, but for the sets: models, the rule, versions."""
    rows = []
    for model in found.models:
        rows.append(row(f"model “{model}”", "; ".join(_described(found.about(model)))))
    rows.append(row("rule", str(found.raw["rule"])))
    versions = found.raw["versions"].items()
    rows.append(row("versions", ", ".join(f"{tool} {version}" for tool, version in versions)))
    return Table(("what", "is"), tuple(rows), text_columns=frozenset({1}))


def _described(about: Mapping[str, Any]) -> Iterator[str]:
    yield str(about["architecture"])
    yield f"weights {about['digest']}"
    for key, title in (("text_digest", "text tower"), ("transform_digest", "preprocessing")):
        if about.get(key):
            yield f"{title} {about[key]}"
    if about.get("params"):
        yield f"{about['params'] / 1e6:,.1f} million parameters"
    if about.get("gflops"):
        yield f"{about['gflops']:,.1f} GFLOPs an image"
    if about.get("preprocessing"):
        settings = about["preprocessing"]
        told = (
            ", ".join(f"{name} {_plain(value)}" for name, value in settings.items())
            if isinstance(settings, Mapping)
            else str(settings)
        )
        yield f"images: {told}"
    if about.get("source"):
        yield f"from {about['source']}"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " ".join(map(_plain, value))
    return str(value)


def _glance(
    found: Findings, evalset: str, metric: str, notes: Footnotes, with_paper: bool
) -> Iterator[Cell | str]:
    ours = found.share(evalset, found.subject, metric) or 0.0
    bounds = found.interval(evalset, found.subject, metric)
    chance = found.chance(evalset, metric)
    published = found.published(evalset, found.subject, metric)
    yield Cell(_figure(found, evalset, metric), link=anchor(evalset))
    yield Cell(percent(ours), "value")
    yield interval(bounds) if bounds else NOTHING
    reference = published.value if published else None
    drawing = interval_bar(ours, bounds, published=reference, chance=chance)
    yield Cell("", drawing=drawing)
    if with_paper:
        yield _published_cell(published, notes) if published else NOTHING
        yield signed(_difference(ours, published)) if published else NOTHING
        yield Cell(published.verdict, STYLES[published.verdict]) if published else NOTHING
    for other in found.others:
        share = found.share(evalset, other, metric)
        yield NOTHING if share is None else percent(share)
    yield NOTHING if chance is None else percent(chance)
    yield f"{found.set(evalset)['n']:,}"
    warnings = len(found.set(evalset)["warnings"])
    yield Cell(str(warnings), "warned", link=anchor(evalset)) if warnings else ""


def _figure(found: Findings, evalset: str, metric: str) -> str:
    """A set and its figure in one name; of top-1 the set's alone."""
    return found.name(evalset) + ("" if metric == "top1" else f" · {title_of(metric)}")


def _published(found: Findings, evalset: str) -> Sequence[Published]:
    metrics = found.headlines(evalset)
    each = [found.published(evalset, found.subject, metric) for metric in metrics]
    return [one for one in each if one is not None]


def _compared(found: Findings, model: str) -> Iterator[tuple[str, str, Published]]:
    for evalset in found.sets:
        for metric in found.metrics(evalset):
            published = found.published(evalset, model, metric)
            if published is not None:
                yield evalset, metric, published


def _published_cell(published: Published, notes: Footnotes) -> Cell:
    if published.value is None:
        return Cell(NOTHING)
    return Cell(f"{100 * published.value:.1f} %", notes=notes.numbers(published.errata))


def _difference(ours: float | None, published: Published | None) -> float | None:
    """Points between ours and what is published."""
    if ours is None or published is None or published.value is None:
        return None
    return 100 * (ours - published.value)


def _against(found: Findings, other: str, headlines_only: bool) -> Iterator[Row]:
    for evalset in found.sets:
        for metric, one in found.paired(evalset).get(other, {}).items():
            if headlines_only and metric not in found.headlines(evalset):
                continue
            ours = found.share(evalset, found.subject, metric)
            theirs = found.share(evalset, other, metric)
            low, high = (100 * float(bound) for bound in one["interval"])
            p = one.get("p")
            sure = p is not None and p < SURE
            yield row(
                Cell(found.name(evalset), link=anchor(evalset)),
                other,
                title_of(metric),
                NOTHING if ours is None else percent(ours),
                NOTHING if theirs is None else percent(theirs),
                Cell(signed(100 * float(one["difference"]), 2), _direction(one, sure)),
                f"{signed(low, 2)} … {signed(high, 2)}",
                Cell(NOTHING if p is None else p_value(float(p)), "" if sure else "quiet"),
            )


SURE = 0.05
"""p-value below which a difference is coloured."""


def _direction(one: Mapping[str, Any], sure: bool) -> str:
    if not sure:
        return "quiet"
    return "good" if one["difference"] > 0 else "bad"


def sets_and_images(found: Findings) -> str:
    """How much was evaluated: 33 sets, 512,000 images."""
    images = sum(int(found.set(one)["n"]) for one in found.sets)
    return f"{plural(len(found.sets), 'set')}, {plural(images, 'image')}"
