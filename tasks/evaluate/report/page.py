"""The page of an evaluation: one HTML file that needs no other."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from evaclip_model.zeroshot.statistics import chance_of_hit, hit_rate
from tasks.evaluate.metrics.scored import Scored
from tasks.evaluate.paper.published import paper, rows_of
from tasks.evaluate.report import examples, tables
from tasks.evaluate.report.charts import Bubble, ChartLine, bubble_chart, line_chart
from tasks.evaluate.report.curves import Curve, loss_chart
from tasks.evaluate.report.findings import Findings
from tasks.evaluate.report.numbers import format_ordinal, format_percent, format_plural
from tasks.evaluate.report.paper_form import paper_tables
from tasks.evaluate.report.summary import headline_tiles, summary_sentences
from tasks.table import html_table

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

FAMILIES = {"EVA": "eva", "OpenAI": "openai", "Open": "open"}
"""First word of a model's name in the paper -> style of its circle."""


def compute_chart(found: Findings, images_seen: float) -> Markup | None:
    """Accuracy against compute as the paper's Figure 1, when ImageNet-1K was evaluated.

    The figure's horizontal axis is not stated; here it is the image tower's forward pass. A circle
    stands for forward GFLOPs times training samples, as the caption says; its area here, where the
    paper says diameter, because the range is two hundred to one.

    `images_seen` are the subject's image-text pairs where its training is known, else 0.
    """
    shares = {model: found.set_results("imagenet1k", model).get("top1") for model in found.models}
    if all(share is None for share in shares.values()):
        return None
    rows = {row.model: row.cells for row in rows_of("1a")}
    bubbles = []
    for one in paper().models:
        top1, samples = (rows[one.row][key] for key in ("in1k_zs_top1", "samples_seen"))
        family = FAMILIES[one.row.replace("-", " ").split()[0]]
        bubbles.append(Bubble(one.gflops, top1, one.gflops * samples, one.row, family))
    for model, share in shares.items():
        about = found.describe_model(model)
        gflops, beside = about["gflops"], about["paper"]
        if share is not None and gflops:
            seen = images_seen if model == found.subject else 0
            if not seen and beside and beside["is_released"]:
                seen = rows[beside["row"]]["samples_seen"]
            bubbles.append(Bubble(gflops, 100 * share, gflops * seen or None, model, "subject"))
    return bubble_chart(bubbles, x="forward GFLOPs an image", y="ImageNet-1K zero-shot top-1, %")


def write_page(
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
    environment.filters["ordinal"] = format_ordinal
    environment.globals["table"] = html_table
    found, images_seen = Findings(results), sum(curve.samples[-1] for curve in curves)
    parts: dict[str, Any] = {
        "failures": tables.failure_table(found),
        "glance": tables.glance_table(found),
        "verdicts": tables.verdict_table(found),
        "paper": paper_tables(found),
        "averages": tables.average_table(found),
        "compute": compute_chart(found, images_seen),
        "comparisons": tables.comparison_table(found, headlines_only=True),
        "all_comparisons": tables.comparison_table(found, headlines_only=False),
        "contamination": tables.contamination_table(found),
        "curves": [(curve, loss_chart(curve)) for curve in curves],
        "sets": [*_describe_sets(found, scored)],
        "provenance": tables.provenance_table(found),
    }
    return environment.get_template("report.html.j2").render(
        found=found,
        subject=found.subject,
        about=found.describe_model(found.subject),
        sections=[place for part, place in SECTIONS.items() if parts[part]],
        sentences=summary_sentences(found),
        tiles=headline_tiles(found),
        extent=tables.count_sets_and_images(found),
        images_seen=images_seen,
        lineage=Markup(lineage),
        **parts,
    )


def depth_chart(by_model: Mapping[str, Scored], subject: str) -> Markup:
    """Share of right answers among the first k, over k, for every model and for chance."""
    rankings = {
        name: next(iter(one.rankings_by_direction().values())) for name, one in by_model.items()
    }
    first = next(iter(by_model.values()))
    answers = len(first.evalset.classnames) or len(first.evalset.captions)
    ks = sorted({max(1, round(answers ** (i / 40))) for i in range(41)})
    owned = [max(1, len(sample.captions)) for sample in first.evalset.samples]
    chance = [(k, 100 * chance_of_hit(k, answers, owned)) for k in ks]
    lines = [ChartLine(chance, "chance", "chance")]
    for name, ranking in reversed(rankings.items()):
        style = "subject" if name == subject else "other"
        lines.append(ChartLine([(k, 100 * hit_rate(ranking.ranks, k)) for k in ks], name, style))
    return line_chart(lines, x="first k answers", y="right answer among them, %", log_x=True)


def _describe_sets(
    found: Findings, scored: Mapping[str, Mapping[str, Scored]]
) -> Iterator[dict[str, Any]]:
    amount = examples.Amount.for_sets(len(found.sets))
    for key in found.sets:
        about, results = found.describe_set(key), found.set_results(key, found.subject)
        one = scored.get(key, {}).get(found.subject)
        headlines = found.headline_figures(key, found.subject)
        images, captions, questions = (
            format_plural(count, noun)
            for count, noun in (
                (about["n"], "image"),
                (results.get("captions", 0), "caption"),
                (results.get("questions", 0), "question"),
            )
        )
        beside = {"retrieval": captions, "choice": questions}
        classes = format_plural(results.get("classes", 0), "class", "classes")
        yield {
            "key": key,
            "anchor": tables.set_anchor(key),
            "name": found.set_name(key),
            "kind": about["kind"],
            "images": images,
            "captions": captions,
            "size": f"{images}, {beside.get(about['kind'], classes)}",
            "headline": " / ".join(
                format_percent(x.value) for x in headlines if x.value is not None
            ),
            "warnings": about["warnings"],
            "figures": tables.figure_table(found, key),
            "provenance": tables.set_provenance_table(found, key),
            **_draw_examples(found, key, one, amount),
            "depth": depth_chart(scored[key], found.subject)
            if one and one.rankings_by_direction()
            else None,
        }


def _draw_examples(
    found: Findings, key: str, one: Scored | None, amount: examples.Amount
) -> dict[str, Any]:
    """The examples that a set's kind of answers has; the lists of others are empty."""
    ranked = one if one and one.classes is not None else None
    return {
        "classes": tables.class_table(found, key, examples.taken_for(ranked) if ranked else {}),
        "confusions": examples.pick_confusions(ranked, amount) if ranked else [],
        "mistakes": examples.pick_mistakes(ranked, amount) if ranked else [],
        "class_searches": (
            examples.class_searches(one, amount) if one and one.scores is not None else []
        ),
        "searches": examples.pick_searches(one, amount) if one and one.images is not None else [],
        "readings": examples.pick_readings(one, amount) if one and one.texts is not None else [],
    }
