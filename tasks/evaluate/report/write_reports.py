"""Write the reports of an evaluation beside its figures."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaclip_model.files import write_atomically
from tasks.evaluate.config import FIGURES, MARKDOWN, REPORT, SUMMARY
from tasks.evaluate.metrics.scored import Scored
from tasks.evaluate.report.curves import Curve
from tasks.evaluate.report.findings import Findings
from tasks.evaluate.report.markdown import write_markdown, write_short_markdown
from tasks.evaluate.report.page import write_page


def write_reports(
    folder: Path,
    results: Mapping[str, Any],
    scored: Mapping[str, Mapping[str, Scored]],
    curves: Sequence[Curve] = (),
    lineage: str = "",
) -> tuple[Path, ...]:
    """Write the reports of `results` (results.json's content) into `folder`; their paths.

    `scored` is set -> model -> rankings, for pictures and examples; `lineage` an SVG.
    """
    texts = {
        REPORT: write_page(results, scored, curves, lineage),
        MARKDOWN: write_markdown(results, scored, curves),
        SUMMARY: write_short_markdown(results),
        FIGURES: write_csv(results),
    }
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return tuple(folder / name for name in texts)


def write_csv(results: Mapping[str, Any]) -> str:
    """Every figure of every model as a flat table, shares of 1."""
    found = Findings(results)
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(
        ("set", "model", "metric", "value", "low", "high", "chance", "published", "verdict", "n")
    )
    for key in found.sets:
        for model in found.models:
            for one in found.list_figures(key, model):
                published = one.published
                rows.writerow(
                    (
                        *(key, model, one.metric, one.value),
                        *(one.interval or ("", "")),
                        one.chance,
                        *((published.value, published.verdict) if published else ("", "")),
                        found.describe_set(key)["n"],
                    )
                )
    return out.getvalue()
