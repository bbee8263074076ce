"""What tracking and the page of a flow run are told of a merge, an evaluation, a finished recipe.

Covers: what they read as datasets, the files that are kept, the report's address and summary, the
page for whoever pays.
Not here: figures as metrics, which every artifact's totals become (tasks/lineage/stage_record.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from prefect.artifacts import create_link_artifact, create_markdown_artifact

from flows.graph.graph import Chart
from flows.graph.runner import Session
from flows.reporting.results_table import read_findings
from flows.reporting.run_summary import overview_markdown
from tasks.artifacts.artifact import Artifact
from tasks.evaluate.config import ATTACHED, REPORT, SUMMARY
from tasks.lineage.stage_record import outside_dataset
from tasks.merge.config import MergeConfig


def metadata_read(merged: Artifact, config: MergeConfig) -> list[dict[str, str]]:
    """The sources that a finished merge read, as tracking's datasets."""
    return [
        outside_dataset(
            source.name,
            merged.parents[source.name],
            source.files,
            {"target_count": source.target_count},
            "metadata",
        )
        for source in config.sources
        if source.name in merged.parents
    ]


def told_of(sets: Mapping[str, Path | str]) -> dict[str, Any]:
    """Arguments of `Session.make` for an evaluation of `sets` (name -> folder)."""
    return {"outside": partial(sets_read, folders=sets), "attach": ATTACHED}


def sets_read(artifact: Artifact, folders: Mapping[str, Path | str]) -> list[dict[str, str]]:
    """The evaluation sets that a finished evaluation read, as tracking's datasets."""
    found = read_findings(artifact.folder)
    return [
        outside_dataset(
            name,
            found.set(name)["fingerprint"],
            _uri(folders[name]),
            {key: found.set(name)[key] for key in ("n", "classes", "prompts_digest")},
            "evaluation",
        )
        for name in found.sets
        if name in folders
    ]


def _uri(folder: Path | str) -> str:
    return folder if isinstance(folder, str) else folder.resolve().as_uri()


def publish_evaluation(artifact: Artifact, url: str | None) -> None:
    """Put the report's address and its summary beside the flow run.

    Args:
        artifact: the evaluation.
        url: page of its tracking run, which keeps the report; None for a store without pages.
    """
    report = artifact.folder / REPORT
    link = f"{url}/artifacts/{REPORT}" if url else report.as_uri()
    create_link_artifact(link=link, link_text="Evaluation report", key="evaluation-report")
    text = (artifact.folder / SUMMARY).read_text()
    create_markdown_artifact(text, key="evaluation-summary", description="Figures of an evaluation")


def publish_overview(session: Session, chart: Chart) -> None:
    """Put the page for whoever pays beside the flow run (`overview_markdown`)."""
    page = overview_markdown(session.recipe, chart, session.run.url())
    create_markdown_artifact(page, key="summary")
