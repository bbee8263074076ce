"""From artifacts to what MLflow stores: parameters, metrics, tags, datasets, logged models. Not
here: the rest of MLflow (shipper.py), the journal (journal.py), a registered version's own logged
model (tasks/register). Weights stay where they are; a logged model says where, and which."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from evaclip_model.training.config import MODEL_FOLDER
from tasks.artifacts.artifact import CARD, MANIFEST, Address, Artifact, Role, flatten_settings

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Metric

PREFIX = "evaclip."
MAX_PARAM_CHARS = 6000
MAX_TAG_CHARS = 8000
MAX_METRICS_PER_CALL = 1000
_NOT_IN_A_NAME = re.compile(r"[^\w\-./ :]", re.ASCII)
WEIGHTS = f"{MODEL_FOLDER}/model.safetensors"
"""Among the files of every artifact that is a model."""
MODEL_TAG = f"{PREFIX}model"
"""Of a logged model: digest of the stage's artifact. A registered version's has others."""


def metric_name(name: str) -> str:
    """`name` with every character that MLflow refuses replaced by `_`."""
    return _NOT_IN_A_NAME.sub("_", name).strip("/")


def flatten_config(config: Mapping[str, Any]) -> dict[str, str]:
    """A nested config as flat parameters: `a.b.c` -> text."""
    texts = {
        key: value if isinstance(value, str) else json.dumps(value, default=str)
        for key, value in flatten_settings("", config)
    }
    return {metric_name(key): text[:MAX_PARAM_CHARS] for key, text in texts.items()}


def stage_tags(address: Address, reused: bool) -> dict[str, str]:
    """Tags that identify a stage's run: its digest, its parents', and whether it was reused."""
    tags = {
        "stage": address.stage.name,
        "digest": address.digest,
        "stage_version": str(address.stage.version),
        "folder": str(address.folder),
        "reused": str(reused).lower(),
        **{f"parent.{role}": digest for role, digest in address.parents.items()},
    }
    return {PREFIX + name: value[:MAX_TAG_CHARS] for name, value in tags.items()}


def count_metrics(artifact: Artifact) -> dict[str, float]:
    return {metric_name(name): float(count) for name, count in artifact.counts.items()}


def series_metrics(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one line of `metrics.jsonl`, less its axes (step, time), each by the names and
    places on the way to it: `{"trust": {"vision": {"min": 0.1}}}` is `trust_vision_min`."""
    rest = {name: value for name, value in line.items() if name not in ("step", "time")}
    return {metric_name(name): number for name, number in _iterate_numbers("", rest)}


def _iterate_numbers(prefix: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping | list | tuple):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _iterate_numbers(f"{prefix}_{key}" if prefix else str(key), inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield prefix, float(value)


def describe_dataset(artifact: Artifact, context: str) -> dict[str, str]:
    """An artifact as an MLflow dataset: its digest, manifest and card as source, counts as profile,
    and what it is read for, in MLflow's column "context" (training, evaluation, …)."""
    uri = (artifact.folder / MANIFEST).resolve().as_uri()
    card = {"card": (artifact.folder / CARD).resolve().as_uri()} if CARD in artifact.files else {}
    return outside_dataset(artifact.kind, artifact.digest, uri, artifact.counts, context, **card)


def outside_dataset(
    name: str, digest: str, uri: str, profile: Mapping[str, Any], context: str, **more: str
) -> dict[str, str]:
    """Data as an MLflow dataset: also what no stage made, such as an evaluation set."""
    return {
        "name": name,
        "digest": digest,
        "source_type": "local",
        "source": json.dumps({"uri": uri, **more}),
        "profile": json.dumps(profile)[:16_000],
        "context": context,
    }


def model_event(artifact: Artifact, reused: bool) -> dict[str, Any] | None:
    """The journal's event: the model that a stage made, those it read, and what it measured of one;
    None for a stage that has to do with none."""
    weights, parents = artifact.files.get(WEIGHTS), artifact.parents
    if weights is None and Role.TRAINED not in parents:
        return None
    # A registration has the trained model among its parents, too, and measures nothing of it.
    judged = None if Role.EVALUATION in parents else parents.get(Role.TRAINED)
    return {
        "op": "models",
        "reused": reused,
        "used": [digest for role, digest in parents.items() if role != Role.DATASET],
        "made": None if weights is None else _describe_model(artifact, weights),
        "judged": judged,
        "figures": count_metrics(artifact) if judged else {},
    }


def _describe_model(artifact: Artifact, weights: Mapping[str, int | str]) -> dict[str, Any]:
    name, uri = artifact.config.get("name"), (artifact.folder / WEIGHTS).resolve().as_uri()
    tags = {MODEL_TAG: artifact.digest, f"{PREFIX}stage": artifact.kind}
    tags |= {f"{PREFIX}parent.{role}": digest for role, digest in artifact.parents.items()}
    return {
        "name": metric_name(f"{artifact.kind}-{name}" if isinstance(name, str) else artifact.kind),
        "digest": artifact.digest,
        "params": {"uri": uri, **{key: str(value) for key, value in weights.items()}},
        "tags": tags,
    }


def log_points(client: MlflowClient, run: str, points: Sequence[Metric]) -> None:
    for start in range(0, len(points), MAX_METRICS_PER_CALL):
        client.log_batch(run, metrics=points[start : start + MAX_METRICS_PER_CALL])


def apply_event(client: MlflowClient, experiment: str, run: str, event: Mapping[str, Any]) -> None:
    """Do in the store what a `model_event` says of one run, once or again; `experiment` and `run`
    are MLflow's ids."""
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
            Metric(name, value, event["time"], 0, model_id=judged.model_id)
            for name, value in event["figures"].items()
        ]
        log_points(client, run, points)


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
