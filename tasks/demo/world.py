"""The demo stage: metadata that points at the loopback server, and held-out evaluation sets.

Covers: the artifact's content.
Not here: serving the pictures (`demo_web.py`), building the committed data
(`tests/tasks/demo/build_images.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from tasks.artifacts.artifact import Made
from tasks.demo.concepts import read_concepts
from tasks.demo.config import DemoConfig
from tasks.demo.demo_evalsets import write_eval_sets
from tasks.demo.metadata import write_metadata
from tasks.demo.web_plan import Source, plan_rows
from tasks.progress import Report, report_nothing

SOURCES: tuple[Source, ...] = get_args(Source)


def make_demo(config: DemoConfig, out: Path, report: Report = report_nothing) -> Made:
    """Write `metadata/SOURCE/*.parquet` and `eval/SET/...` into `out`.

    Counts: concepts, and rows per source as `SOURCE.rows`.
    """
    concepts = read_concepts()
    files: list[Path] = []
    counts = {"concepts": len(concepts)}
    for done, source in enumerate(SOURCES):
        report(done, len(SOURCES) + 1, f"metadata of {source}")
        rows = plan_rows(source, concepts, config.port)
        counts[f"{source}.rows"] = len(rows)
        files += write_metadata(source, rows, out / "metadata" / source)
    report(len(SOURCES), len(SOURCES) + 1, "evaluation sets")
    files += write_eval_sets(concepts, out / "eval")
    report(len(SOURCES) + 1, len(SOURCES) + 1)
    return Made(counts=counts, files=tuple(files))
