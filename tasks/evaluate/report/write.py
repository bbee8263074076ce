"""Write the reports of an evaluation beside its figures.

Covers: the files for people that are made of `results.json` and the rankings behind it.
Not here: any figure, what the reports hold (page.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.artifact import write_atomically
from tasks.evaluate.config import REPORT
from tasks.evaluate.figures import Scored
from tasks.evaluate.report.curves import Curve
from tasks.evaluate.report.page import page


def write_reports(
    folder: Path,
    results: Mapping[str, Any],
    scored: Mapping[str, Mapping[str, Scored]],
    curves: Sequence[Curve] = (),
) -> tuple[Path, ...]:
    """Write the reports of `results` (results.json's content) into `folder`; their paths.

    Args:
        folder: of the evaluation's artifact.
        results: every figure, with what it rests on.
        scored: set -> model -> rankings, for pictures and examples.
        curves: of the training stages behind the model, in order.
    """
    write_atomically(folder / REPORT, page(results, scored, curves))
    return (folder / REPORT,)
