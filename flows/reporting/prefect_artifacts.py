"""What a flow run's page shows: links, summaries, tables and the picture of a model's lineage.

Covers: what became of every source's rows, an evaluation's report, a registered version's lineage,
the page of a finished recipe for managers.
Not here: what tracking gets of every step (flows/graph/step.py), drawing (tasks/lineage).
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from flows.graph.ancestry import ancestors_of
from flows.graph.graph import Graph
from flows.graph.runner import RecipeSession
from flows.reporting.run_summary import overview_markdown, per_source
from tasks.artifacts.artifact import Artifact, read_artifacts
from tasks.artifacts.provenance import LINEAGE, Lineage
from tasks.evaluate.config import REPORT, SUMMARY
from tasks.lineage.lineage_svg import lineage_svg
from tasks.register.aliases import RegisteredVersion

PICTURE = "lineage.svg"


def publish_sources(version: Artifact, root: Path) -> None:
    """Put what became of every source's rows beside the flow run that made a dataset version."""
    made = ancestors_of(version, read_artifacts(root))
    create_table_artifact(
        per_source(made, version),
        key="sources",
        description="What became of every source's rows",
    )


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


def publish_overview(session: RecipeSession, graph: Graph) -> None:
    """Put the page of a finished recipe beside the flow run (`overview_markdown`)."""
    page = overview_markdown(session.recipe, graph, session.run.url())
    create_markdown_artifact(page, key="summary")


def publish_lineage(session: RecipeSession, registered: Artifact) -> None:
    """Put the picture of what a version was made from beside the flow run and its MLflow run."""
    document = json.loads((registered.folder / LINEAGE).read_text())
    lineage = Lineage.from_mapping(document, where=LINEAGE)
    version = RegisteredVersion.from_registration(registered.folder)
    picture = lineage_svg(lineage, str(version))
    session.run.append({"op": "text", "file": PICTURE, "text": picture})
    # The picture itself: a flow run's page is read without this machine's files.
    data = base64.b64encode(picture.encode()).decode()
    create_image_artifact(
        f"data:image/svg+xml;base64,{data}",
        key="lineage",
        description=f"What {version} was made from; `python -m flows lineage {version}` says more",
    )
