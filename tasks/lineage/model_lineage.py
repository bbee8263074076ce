"""Models of stages as MLflow's logged models: made by one run, read by the next.

Covers: the journal's event of an artifact that is a model or was made from models, and what that
event does in the store; doing it twice changes nothing.
Not here: the journal (journal.py), a registered version's own logged model (tasks/register).

The weights stay where they are; the logged model says where, how many, and which.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tasks.artifacts.artifact import Artifact
from tasks.lineage.stage_record import PREFIX, metric_name

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

WEIGHTS = "model/model.safetensors"
"""Among the files of every artifact that is a model."""
MODEL_TAG = f"{PREFIX}model"
"""Of a logged model: digest of the stage's artifact. A registered version's has others."""
JUDGED = "train"
"""Role of the trained model among the parents of an evaluation, whose figures are of it, and of a
registration."""


def model_event(artifact: Artifact, reused: bool) -> dict[str, Any] | None:
    """The journal's event: the model that a stage made, those it may have been made from, and what
    it measured of one; None for a stage that has to do with none."""
    weights = artifact.files.get(WEIGHTS)
    judged = artifact.parents.get(JUDGED) if artifact.kind == "evaluate" else None
    used = {role: digest for role, digest in artifact.parents.items() if role != "dataset"}
    if weights is None and JUDGED not in artifact.parents:
        return None
    return {
        "op": "models",
        "reused": reused,
        "used": list(used.values()),
        "made": None if weights is None else _describe_model(artifact, weights),
        "judged": judged,
        "figures": {metric_name(name): float(value) for name, value in artifact.counts.items()}
        if judged
        else {},
    }


def _describe_model(artifact: Artifact, weights: Mapping[str, int | str]) -> dict[str, Any]:
    name = artifact.config.get("name")
    tags = {MODEL_TAG: artifact.digest, f"{PREFIX}stage": artifact.kind}
    return {
        "name": metric_name(f"{artifact.kind}-{name}" if isinstance(name, str) else artifact.kind),
        "digest": artifact.digest,
        "params": {
            "uri": (artifact.folder / WEIGHTS).resolve().as_uri(),
            **{key: str(value) for key, value in weights.items()},
        },
        "tags": {**tags, **{f"{PREFIX}parent.{k}": v for k, v in artifact.parents.items()}},
    }


def apply_event(
    client: MlflowClient, experiment: str, run: str, event: Mapping[str, Any], time: int
) -> None:
    """Do in the store what the event says of one run.

    Args:
        client: of the store.
        experiment: its id.
        run: MLflow's id of the run.
        event: what `event` made.
        time: of the figures, in UNIX milliseconds.
    """
    from mlflow.entities import LoggedModelInput, LoggedModelOutput, Metric

    logged = client.get_run(run)
    read = {one.model_id for one in (logged.inputs.model_inputs or ())}
    known = [_find_model(client, experiment, digest) for digest in event["used"]]
    new = [one.model_id for one in known if one is not None and one.model_id not in read]
    if new:
        client.log_inputs(run, models=[LoggedModelInput(model_id) for model_id in new])
    if event["made"] is not None:
        made = _find_model(client, experiment, event["made"]["digest"])
        if made is None:
            made = _make_model(client, experiment, run, event["made"])
        written = {one.model_id for one in (logged.outputs.model_outputs or ())}
        if made.source_run_id == run and made.model_id not in written:
            client.log_outputs(run, [LoggedModelOutput(made.model_id, step=0)])
    judged = _find_model(client, experiment, event["judged"]) if event["judged"] else None
    if judged is not None and not event["reused"]:
        points = [
            Metric(name, value, time, 0, model_id=judged.model_id)
            for name, value in event["figures"].items()
        ]
        for few in _in_parts(points, 1000):
            client.log_batch(run, metrics=few)


def _find_model(client: MlflowClient, experiment: str, digest: str) -> LoggedModel | None:
    found = client.search_logged_models([experiment], f"tags.`{MODEL_TAG}` = '{digest}'")
    whole = [one for one in found if str(one.status) == "READY"]
    for half in found:
        if half not in whole:
            client.delete_logged_model(half.model_id)
    return whole[0] if whole else None


def _make_model(
    client: MlflowClient, experiment: str, run: str, made: Mapping[str, Any]
) -> LoggedModel:
    from mlflow.models.utils import get_external_mlflow_model_spec
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL

    logged = client.create_logged_model(
        experiment,
        made["name"],
        source_run_id=run,
        tags={**made["tags"], MLFLOW_MODEL_IS_EXTERNAL: "true"},
        params=made["params"],
        model_type="checkpoint",
    )
    with TemporaryDirectory() as folder:
        get_external_mlflow_model_spec(logged).save(str(Path(folder) / "MLmodel"))
        client.log_model_artifacts(logged.model_id, folder)
    return client.finalize_logged_model(logged.model_id, "READY")


def _in_parts(points: list[Any], most: int) -> Iterator[list[Any]]:
    for start in range(0, len(points), most):
        yield points[start : start + most]
