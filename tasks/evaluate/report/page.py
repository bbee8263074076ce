"""The page of an evaluation: one HTML file that needs no other.

Covers: what each part of the page is filled with.
Not here: any figure (results.json has them all), what stands in tables (overview.py, paper_form.py,
set_tables.py), drawing (charts.py, pictures.py), examples (examples.py), looks (report.html.j2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from evaclip_model.zeroshot.statistics import chance_of_hit, hit_rate
from tasks.evaluate.metrics.scored import Scored, captions_of
from tasks.evaluate.report import overview, set_tables, summary
from tasks.evaluate.report.charts import Line, line_chart
from tasks.evaluate.report.compute import compute_chart
from tasks.evaluate.report.curves import Curve, images_seen, loss_chart
from tasks.evaluate.report.examples import (
    Amount,
    class_searches,
    confusions,
    mistakes,
    readings,
    searches,
    taken_for,
)
from tasks.evaluate.report.findings import Findings
from tasks.evaluate.report.numbers import ordinal, percent, plural
from tasks.evaluate.report.paper_form import paper_tables

SECTIONS = {
    "failures": ("failed", "Failed sets"),
    "glance": ("figures", "All sets"),
    "verdicts": ("verdicts", "Beside the paper"),
    "paper": ("paper", "The paper's tables"),
    "compute": ("compute", "Compute"),
    "comparisons": ("models", "Other models"),
    "contamination": ("contamination", "Seen in training?"),
    "curves": ("training", "Training"),
    "sets": ("sets", "Set by set"),
    "provenance": ("provenance", "Provenance"),
}
"""Part of the page -> its anchor and its name in the navigation, when it is there."""


def page(
    results: Mapping[str, Any],
    scored: Mapping[str, Mapping[str, Scored]],
    curves: Sequence[Curve],
    lineage: str = "",
) -> str:
    """The whole page as text; `lineage` is an SVG, drawn by this project."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["ordinal"] = ordinal
    found = Findings(results)
    parts: dict[str, Any] = {
        "failures": overview.failures(found),
        "glance": overview.at_a_glance(found),
        "verdicts": overview.verdicts(found),
        "paper": paper_tables(found),
        "averages": overview.averages(found),
        "robustness": overview.robustness(found),
        "compute": compute_chart(found, images_seen(curves)),
        "comparisons": overview.comparisons(found, headlines_only=True),
        "all_comparisons": overview.comparisons(found, headlines_only=False),
        "contamination": overview.contamination(found),
        "curves": [(curve, loss_chart(curve)) for curve in curves],
        "sets": [*_sets(found, scored)],
        "provenance": overview.provenance(found),
    }
    return environment.get_template("report.html.j2").render(
        found=found,
        subject=found.subject,
        about=found.about(found.subject),
        sections=[place for part, place in SECTIONS.items() if parts[part]],
        sentences=summary.sentences(found),
        tiles=summary.tiles(found),
        extent=overview.sets_and_images(found),
        images_seen=images_seen(curves),
        lineage=lineage,
        **parts,
    )


def depth_chart(by_model: Mapping[str, Scored], subject: str) -> str:
    """Share of right answers among the first k, over k, for every model and for chance."""
    rankings = {name: next(iter(one.rankings().values())) for name, one in by_model.items()}
    first = next(iter(by_model.values()))
    answers = len(first.evalset.classnames) or len(captions_of(first.evalset))
    ks = sorted({max(1, round(answers ** (i / 40))) for i in range(41)})
    owned = [max(1, len(sample.captions)) for sample in first.evalset.samples]
    chance = [(k, 100 * chance_of_hit(k, answers, owned)) for k in ks]
    lines = [Line(chance, "chance", "chance")]
    for name, ranking in reversed(rankings.items()):
        style = "subject" if name == subject else "other"
        lines.append(Line([(k, 100 * hit_rate(ranking.ranks, k)) for k in ks], name, style))
    return line_chart(lines, x="first k answers", y="right answer among them, %", log_x=True)


def _sets(found: Findings, scored: Mapping[str, Mapping[str, Scored]]) -> Iterator[dict[str, Any]]:
    amount = Amount.for_sets(len(found.sets))
    for key in found.sets:
        about, figures = found.set(key), found.figures(key, found.subject) or {}
        one = scored.get(key, {}).get(found.subject)
        headlines = (found.share(key, found.subject, metric) for metric in found.headlines(key))
        images = plural(int(about["n"]), "image")
        captions = plural(int(figures.get("captions", 0)), "caption")
        classes = plural(int(figures.get("classes", 0)), "class", "classes")
        yield {
            "key": key,
            "anchor": overview.anchor(key),
            "name": found.name(key),
            "kind": about["kind"],
            "images": images,
            "captions": captions,
            "size": f"{images}, {captions if about['kind'] == 'retrieval' else classes}",
            "headline": " / ".join(percent(share) for share in headlines if share is not None),
            "warnings": about["warnings"],
            "figures": set_tables.figures(found, key),
            "provenance": set_tables.provenance(found, key),
            **_examples(found, key, one, amount),
            "depth": depth_chart(scored[key], found.subject) if one and one.rankings() else None,
        }


def _examples(found: Findings, key: str, one: Scored | None, amount: Amount) -> dict[str, Any]:
    ranked = one is not None and one.classes is not None
    return {
        "classes": set_tables.classes(found, key, taken_for(one) if one and ranked else {}),
        "confusions": confusions(one, amount) if one and ranked else [],
        "mistakes": mistakes(one, amount) if one and ranked else [],
        "class_searches": (class_searches(one, amount) if one and one.scores is not None else []),
        "searches": searches(one, amount) if one and one.images is not None else [],
        "readings": readings(one, amount) if one and one.texts is not None else [],
    }
