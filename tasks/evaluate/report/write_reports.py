"""Write the reports of an evaluation beside its figures.

Covers: the files for people that are made of `results.json` and the rankings behind it.
Not here: any figure; what the reports hold (page.py, markdown.py).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaclip_model.files import write_atomically
from tasks.evaluate.config import REPORT
from tasks.evaluate.metrics.scored import Scored
from tasks.evaluate.report.curves import Curve
from tasks.evaluate.report.findings import Findings
from tasks.evaluate.report.markdown import markdown, short_markdown
from tasks.evaluate.report.page import page
from tasks.evaluate.report.report_files import FIGURES, MARKDOWN, SUMMARY


def write_reports(
    folder: Path,
    results: Mapping[str, Any],
    scored: Mapping[str, Mapping[str, Scored]],
    curves: Sequence[Curve] = (),
    lineage: str = "",
) -> tuple[Path, ...]:
    """Write the reports of `results` (results.json's content) into `folder`; their paths.

    Args:
        folder: of the evaluation's artifact.
        results: every figure, with what it rests on.
        scored: set -> model -> rankings, for pictures and examples.
        curves: of the training stages behind the model, in order.
        lineage: what the model was made from, as an SVG.
    """
    texts = {
        REPORT: page(results, scored, curves, lineage),
        MARKDOWN: markdown(results, scored, curves),
        SUMMARY: short_markdown(results),
        FIGURES: figures_csv(results),
    }
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return tuple(folder / name for name in texts)


def figures_csv(results: Mapping[str, Any]) -> str:
    """Every figure of every model as a flat table, shares of 1."""
    found = Findings(results)
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(
        ("set", "model", "metric", "value", "low", "high", "chance", "published", "verdict", "n")
    )
    for evalset in found.sets:
        for model in found.models:
            for metric in found.metrics(evalset):
                value = found.share(evalset, model, metric)
                if value is None:
                    continue
                published = found.published(evalset, model, metric)
                rows.writerow(
                    (
                        *(evalset, model, metric, value),
                        *(found.interval(evalset, model, metric) or ("", "")),
                        found.chance(evalset, metric),
                        *((published.value, published.verdict) if published else ("", "")),
                        found.set(evalset)["n"],
                    )
                )
    return out.getvalue()
