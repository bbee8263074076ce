"""The lineage of a registered version, shown where people look: beside the flow run, in MLflow.

Covers: reading what the registration wrote, the picture as Prefect's and as MLflow's artifact.
Not here: drawing (tasks/lineage/lineage_svg.py), the tree in the terminal (lineage.py).
"""

from __future__ import annotations

import base64
import json

from prefect.artifacts import create_image_artifact

from flows.graph.runner import Session
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.provenance import LINEAGE, Lineage
from tasks.lineage.lineage_svg import lineage_svg
from tasks.register.aliases import RegisteredVersion

PICTURE = "lineage.svg"


def publish_lineage(session: Session, registered: Artifact) -> None:
    """Put the picture of what a version was made from beside the flow run and its MLflow run."""
    document = json.loads((registered.folder / LINEAGE).read_text())
    lineage = Lineage.from_mapping(document, where=LINEAGE)
    version = RegisteredVersion.of(registered.folder)
    picture = lineage_svg(lineage, str(version))
    session.run.append({"op": "text", "file": PICTURE, "text": picture})
    # The picture itself: a flow run's page is read without this machine's files.
    data = base64.b64encode(picture.encode()).decode()
    create_image_artifact(
        f"data:image/svg+xml;base64,{data}",
        key="lineage",
        description=f"What {version} was made from; `python -m flows lineage {version}` says more",
    )
