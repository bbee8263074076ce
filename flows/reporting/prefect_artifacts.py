"""The page of a flow run: links, summaries, tables, the picture of a model's lineage, and the page
of a finished recipe for those who pay for it. Not here: figures on the command line
(flows/commands/run.py), what tracking gets of every step (flows/graph/step.py)."""

import base64
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from flows.graph.ancestry import ancestors_of
from flows.graph.graph import Graph
from flows.graph.runner import RecipeSession
from flows.graph.step import finished_artifact
from tasks.adopt.config import STAGE as ADOPT
from tasks.artifacts.artifact import LINEAGE, Artifact, Lineage, Stage, read_artifacts
from tasks.download.config import STAGE as DOWNLOAD
from tasks.evaluate.config import REPORT, SUMMARY
from tasks.lineage.lineage_svg import lineage_svg
from tasks.merge.config import STAGE as MERGE
from tasks.register.model_versions import RegisteredVersion
from tasks.register.promotion import read_decision
from tasks.table import Cell, Table, markdown_table, words

PICTURE = "lineage.svg"


def per_source(made: Sequence[Artifact], version: Artifact) -> list[dict[str, Any]]:
    """Rows of every source that reached each stage, a row a source, most images first: of merges,
    downloads and adoptions among `made`, and of the dataset `version` that was chosen of them."""
    merged, downloaded = _sum_counts(made, MERGE), _sum_counts(made, DOWNLOAD)
    adopted = _sum_counts(made, ADOPT)
    names = [key.removesuffix(".rows_read") for key in merged if key.endswith(".rows_read")]
    names += [key.removesuffix(".shards") for key in adopted if key.endswith(".shards")]
    rows = [
        {
            "source": name,
            "rows of metadata": merged[f"{name}.rows_read"],
            "selected": merged[f"{name}.selected"],
            "downloaded": downloaded[f"{name}.samples"],
            "in the dataset": version.counts.get(f"{name}.samples", 0),
        }
        for name in names
    ]
    return sorted(rows, key=lambda row: -int(row["in the dataset"]))


def publish_overview(session: RecipeSession, graph: Graph) -> None:
    """Put the page of a finished recipe, or retraining, beside the flow run."""
    version = finished_artifact(graph.dataset)
    made = ancestors_of(version, read_artifacts(graph.site.root))
    stages = [finished_artifact(step) for step in graph.train]
    rows = per_source(made, version)
    asked, got = _sum_counts(made, MERGE)["selected"], _sum_counts(made, DOWNLOAD)["samples"]
    share = f" ({got / asked:.0%} of those asked for)" if asked else ""
    pairs = sum(stage.counts["samples_seen"] for stage in stages)
    hours = sum(stage.counts["seconds"] for stage in stages) / 3600
    took = f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
    several = "s" * (len(stages) > 1)
    facts = Table.of("", words(""))
    facts.add("Model", str(RegisteredVersion.from_registration(graph.register.folder)))
    facts.add("Decision", read_decision(graph.register.folder).summary)
    data = f"{version.counts['samples']:,} images with captions from {len(rows)} sources"
    facts.add("Data", f"{data}; {got:,} were downloaded{share}")
    facts.add("Training", f"{pairs:,} pairs shown in {len(stages)} stage{several}, {took}")
    facts.add("Dataset", version.digest)
    if url := session.run.url():
        facts.add("Record", Cell("MLflow run", url=url))
    parts = [f"# {session.recipe.title}", markdown_table(facts)]
    if rows:
        table = Table.of(*rows[0], "shown in training")
        for row in rows:
            shown = sum(stage.counts.get(f"{row['source']}.samples", 0) for stage in stages)
            cells = (*row.values(), shown)
            table.add(*(f"{one:,}" if isinstance(one, int) else one for one in cells))
        parts.append(markdown_table(table))
    figures = (graph.evaluate.folder / SUMMARY).read_text().partition("\n")[2]
    parts += [figures.strip(), f"Recipe digest `{session.recipe.digest}`."]
    create_markdown_artifact("\n\n".join(parts) + "\n", key="summary")


def _sum_counts(made: Sequence[Artifact], stage: Stage) -> Counter[str]:
    counts: Counter[str] = Counter()
    for artifact in made:
        if artifact.kind == stage.name:
            counts.update(artifact.counts)
    return counts


def publish_sources(version: Artifact, root: Path) -> None:
    """Put what became of every source's rows beside the flow run that made a dataset version."""
    made = ancestors_of(version, read_artifacts(root))
    create_table_artifact(
        per_source(made, version), key="sources", description="What became of every source's rows"
    )


def publish_evaluation(artifact: Artifact, url: str | None) -> None:
    """Put an evaluation's report and its summary beside the flow run; `url` is the page of its
    tracking run, which keeps the report, where the store has pages."""
    report = artifact.folder / REPORT
    link = f"{url}/artifacts/{REPORT}" if url else report.as_uri()
    create_link_artifact(link=link, link_text="Evaluation report", key="evaluation-report")
    text = (artifact.folder / SUMMARY).read_text()
    create_markdown_artifact(text, key="evaluation-summary", description="Figures of an evaluation")


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
