"""Models side by side on a recipe's evaluation sets.

Covers: finding the sets, the data that test images are looked for in, running the stage.
Not here: which models (evaluate.py, gate.py, retrain.py), any models on any sets (score.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from evaclip_model.errors import InputError
from flows.graph.graph import find_files
from flows.graph.runner import Session
from flows.reporting.prefect_artifacts import told_of
from tasks.artifacts.artifact import Address, Artifact, read_artifact
from tasks.artifacts.provenance import lineage_of
from tasks.dataset.config import LEFT_OUT
from tasks.evaluate.metrics.contamination import TrainingData
from tasks.evaluate.task import evaluate as evaluate_stage
from tasks.lineage.lineage_svg import lineage_svg


def measure(
    session: Session,
    address: Address,
    models: Mapping[str, Path],
    curves: Sequence[Path],
    data: Address,
    title: str | None = None,
) -> Artifact:
    """The evaluation at `address`.

    Args:
        session: of the execution.
        address: of the evaluation.
        models: name -> folder; the first one is the subject.
        curves: metrics files of the subject's training stages.
        data: dataset version that the subject was trained on.
        title: what people see; the stage's name by default.
    """
    chart, config = session.chart, session.recipe.evaluate
    sets = {
        one.name: find_files(one.folder, chart.demo, f"evaluate.sets '{one.name}'")[0]
        for one in config.sets
    }
    return session.make(
        *(evaluate_stage, address, config, models, sets, curves),
        *(session.profile.machine, _training_data(session.root, data)),
        _lineage(session.root, next(iter(models.values()))),
        title=title,
        inputs={"evaluation": read_artifact(chart.demo.folder)} if chart.demo else {},
        **told_of(sets),
    )


def _lineage(root: Path, model: Path) -> str:
    """What the model in an artifact's folder was made from, as a picture; empty for any other."""
    try:
        return lineage_svg(lineage_of([read_artifact(model.parent)], root))
    except InputError:
        return ""


def _training_data(root: Path, data: Address) -> list[TrainingData]:
    """What test images are looked for in; none where it was cleared away."""
    verified = list(root.glob(f"*/{data.parents['verify']}"))
    left_out = data.folder / LEFT_OUT
    return [TrainingData(verified[0], left_out)] if verified and left_out.is_file() else []
