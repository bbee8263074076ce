"""Write the reports of an evaluation beside its figures: a page, Markdown, a flat table.

The page is one HTML file that needs no other. What the texts say is in `*.j2` beside this file.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from evaclip_model.errors import escape_control
from evaclip_model.files import write_atomically
from tasks.evaluate.config import FIGURES, MARKDOWN, REPORT, SUMMARY
from tasks.evaluate.metrics.scored import Scored
from tasks.evaluate.paper.published import paper, rows_of
from tasks.evaluate.report import examples, tables
from tasks.evaluate.report.charts import Bubble, Curve, bubble_chart, loss_chart
from tasks.evaluate.report.findings import Findings
from tasks.evaluate.report.numbers import format_percent
from tasks.evaluate.report.paper_form import paper_tables
from tasks.evaluate.report.templates import TEMPLATES

FAMILIES = {"EVA": "eva", "OpenAI": "openai", "Open": "open"}
"""First word of a model's name in the paper -> style of its circle."""
CLASSES_SHOWN = 10
"""Weakest classes of a set in Markdown; the page has all of them."""


def write_reports(
    folder: Path,
    results: Mapping[str, Any],
    scored: Mapping[str, Mapping[str, Scored]],
    curves: Sequence[Curve] = (),
    lineage: str = "",
    search: str = "",
) -> tuple[Path, ...]:
    """Write the reports of `results` (results.json's content) into `folder`; their paths.

    `scored` is set -> model -> rankings, for pictures and examples; `lineage` an SVG, drawn by this
    project; `search` the address that a link to the samples nearest to a picture begins with.
    """
    found, images_seen = Findings(results), sum(curve.samples[-1] for curve in curves)
    parts: dict[str, Any] = {
        "found": found,
        "about": found.describe_model(found.subject),
        "sentences": summary_sentences(found),
        "extent": tables.count_sets_and_images(found),
        "images_seen": images_seen,
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
        "sets": [_describe_set(found, key, scored.get(key, {})) for key in found.sets],
        "provenance": tables.provenance_table(found),
        "lineage": Markup(lineage),
        "search": search,
    }
    texts = {
        name: escape_control(TEMPLATES.get_template(f"{name}.j2").render(parts)) + "\n"
        for name in (REPORT, MARKDOWN, SUMMARY)
    }
    texts[FIGURES] = write_csv(found)
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return tuple(folder / name for name in texts)


def write_csv(found: Findings) -> str:
    """Every figure of every model as a flat table, shares of 1."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(
        ("set", "model", "metric", "value", "low", "high", "chance", "published", "verdict", "n")
    )
    for key in found.sets:
        n = found.describe_set(key)["n"]
        for model in found.models:
            for one in found.list_figures(key, model):
                spread, paper = one.interval or ("", ""), one.paper
                beside = (one.chance, paper.get("published"), paper.get("verdict"), n)
                rows.writerow((key, model, one.metric, one.value, *spread, *beside))
    return out.getvalue()


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


def _describe_set(found: Findings, key: str, scored: Mapping[str, Scored]) -> dict[str, Any]:
    """One set for the templates; examples of other kinds of answers than its own are none."""
    values = [one.value for one in found.headline_figures(key)]
    one, amount = scored.get(found.subject), examples.Amount.for_sets(len(found.sets))
    ranked = one if one and one.classes is not None else None
    classes = tables.class_table(found, key, examples.taken_for(ranked) if ranked else {})
    return {
        "key": key,
        "anchor": tables.set_anchor(key),
        "name": found.set_name(key),
        "about": found.describe_set(key),
        "results": found.set_results(key, found.subject),
        "headline": " / ".join(format_percent(value) for value in values if value is not None),
        "figures": tables.figure_table(found, key),
        "classes": classes,
        "weakest": replace(classes, rows=classes.rows[:CLASSES_SHOWN]),
        "confusions": examples.pick_confusions(ranked, amount) if ranked else [],
        "class_searches": (
            examples.class_searches(one, amount) if one and one.scores is not None else []
        ),
        "searches": examples.pick_searches(one, amount) if one and one.images is not None else [],
        "readings": examples.pick_readings(one, amount) if one and one.texts is not None else [],
        "provenance": tables.set_provenance_table(found, key),
    }


def summary_sentences(found: Findings) -> list[str]:
    """The evaluation in sentences; what they say is in `sentences.txt.j2`."""
    averages, others, seen = [], [], []
    for table, title in tables.TABLES.items():
        if average := found.table_average(table, found.subject):
            figures = tables.list_averaged(found, table, found.subject)
            verdicts = [one.paper.get("verdict") for one in figures]
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
        tests = [one for *_, one in tables.compared_pairs(found, other, headlines_only=True)]
        sure = [one["difference"] > 0 for one in tests if one["p"] < tables.SURE]
        better, worse = sure.count(True), sure.count(False)
        others.append({"name": other, "tests": len(tests), "better": better, "worse": worse})
    for key in found.sets:
        if flagged := found.contaminated_images(key).get("flagged", 0):
            seen.append((flagged / found.describe_set(key)["n"], found.set_name(key)))
    seen.sort(key=lambda pair: -pair[0])
    said = TEMPLATES.get_template("sentences.txt.j2").render(
        found=found,
        about=found.describe_model(found.subject),
        extent=tables.count_sets_and_images(found),
        failed=[found.set_name(one) for one in found.failed],
        counts=tables.count_verdicts(found, found.subject),
        averages=averages,
        others=others,
        sure=str(tables.SURE),
        seen=[{"name": name, "share": format_percent(share)} for share, name in seen],
        warnings=[n for key in found.sets if (n := len(found.describe_set(key)["warnings"]))],
    )
    return said.strip().split("\n")
