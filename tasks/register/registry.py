"""A trained model as a version of a registered model: loadable anywhere, traceable to its rows.

Covers: packing (source, weights, signature; no pickle), uploading, the version with its tags, the
alias of a candidate.
Not here: the model as it runs when loaded (served_model.py), pulling it back (pull.py), whether it
replaces the version in use (gate.py, promotion.py).

Killed at any moment, the next call finds what is there by its tags and goes on from it.
"""

from __future__ import annotations

import io
import json
import shutil
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

import evaclip_model
from evaclip_model.errors import InputError
from tasks.artifact import MANIFEST, Address, Artifact, Made, sha256_of, write_atomically
from tasks.progress import Report, silent
from tasks.register.ancestry import ancestry
from tasks.register.config import REGISTERED, RegisterConfig
from tasks.register.promotion import DIGEST_TAG, WEIGHTS_TAG
from tasks.tracking import TrackingStore, is_refusal

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

SERVED = Path(__file__).with_name("served_model.py")
REQUIREMENTS = (
    *("mlflow", "torch", "numpy", "safetensors", "pydantic", "pillow", "ftfy", "regex"),
    *("open_clip_torch", "pandas"),
)
"""Distributions the loaded model imports or reads data files from."""
_STEPS = 4


def register_model(
    config: RegisterConfig,
    trained: Artifact,
    evaluated: Artifact,
    store: TrackingStore,
    root: Path,
    out: Path,
    run_id: str | None = None,
    report: Report = silent,
) -> Made:
    """Register `trained` under the config's name as a candidate, write `registered.json`.

    Args:
        config: name and aliases.
        trained: the artifact whose folder `model/` is registered.
        evaluated: its evaluation; its figures become tags of the version.
        store: the tracking store whose registry takes it.
        root: root of the artifacts, to find the ancestors whose digests become tags.
        out: folder of this stage's artifact.
        run_id: MLflow run that made the model, when it is known; the version links to it.
        report: told of every step.

    Raises:
        InputError: the store does not answer.
    """
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException

    folder = trained.folder / "model"
    tags = version_tags(trained, evaluated, root)
    try:
        client = store.client()
        report(0, _STEPS, "looking for the same model")
        version = _find_version(client, config.model_name, tags)
        if version is None:
            model_id = _logged_model(
                client, store, config, folder, tags, run_id, out / "packed", report
            )
            report(3, _STEPS, f"registering {config.model_name}")
            version = _create_version(client, store, config.model_name, model_id, run_id, tags)
        client.set_registered_model_alias(
            config.model_name, config.candidate_alias, version.version
        )
    except (MlflowException, RequestException) as error:
        if is_refusal(error):
            raise
        raise store.away(error) from error
    finally:
        shutil.rmtree(out / "packed", ignore_errors=True)
    registered = {
        "name": config.model_name,
        "version": int(version.version),
        "alias": config.candidate_alias,
        "uri": f"models:/{config.model_name}/{version.version}",
        "tracking_uri": store.uri,
    }
    write_atomically(out / REGISTERED, json.dumps(registered, indent=1) + "\n")
    report(_STEPS, _STEPS, f"{config.model_name} version {version.version} is there")
    return Made({"version": int(version.version)}, (out / REGISTERED,))


def forget_if_gone(address: Address, store: TrackingStore) -> None:
    """Unfinish a registration whose version the registry no longer has, so that it is made again.

    An alias that somebody moved since is left where it is.

    Raises:
        InputError: the store does not answer.
    """
    from mlflow.exceptions import MlflowException

    if not address.is_finished:
        return
    registered = json.loads((address.folder / REGISTERED).read_text())
    try:
        store.client().get_model_version(registered["name"], str(registered["version"]))
    except MlflowException as error:
        if not is_refusal(error):
            raise store.away(error) from error
        (address.folder / MANIFEST).unlink()


def version_tags(trained: Artifact, evaluated: Artifact, root: Path) -> dict[str, str]:
    """Tags of a version: what it is, what it was made from, and how well it does."""
    lineage = {**ancestry(evaluated, root), **ancestry(trained, root)}
    return {
        DIGEST_TAG: trained.digest,
        WEIGHTS_TAG: sha256_of(trained.folder / "model" / "model.safetensors"),
        **{f"{DIGEST_TAG}.{label}": digest for label, digest in sorted(lineage.items())},
        **{f"evaluation.{name}": f"{value:g}" for name, value in evaluated.counts.items()},
    }


def _same(tags: dict[str, str]) -> str:
    return " and ".join(f"tags.`{name}` = '{tags[name]}'" for name in (DIGEST_TAG, WEIGHTS_TAG))


def _find_version(client: MlflowClient, name: str, tags: dict[str, str]) -> ModelVersion | None:
    """The version of these very weights, made from this very chain."""
    found = client.search_model_versions(f"name = '{name}'")
    for version in found:
        if all(version.tags.get(tag) == tags[tag] for tag in (DIGEST_TAG, WEIGHTS_TAG)):
            return version
    return None


def _create_version(
    client: MlflowClient,
    store: TrackingStore,
    name: str,
    model_id: str,
    run_id: str | None,
    tags: dict[str, str],
) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = client.get_logged_model(model_id).artifact_location
    # A server wants the id, to check that the source belongs to it. MLflow's own SQLite store would
    # look the id up in whatever store the process has as its global one.
    checked_id = model_id if store.database is None else None
    return client.create_model_version(name, source, run_id=run_id, tags=tags, model_id=checked_id)


def _logged_model(
    client: MlflowClient,
    store: TrackingStore,
    config: RegisterConfig,
    folder: Path,
    tags: dict[str, str],
    run_id: str | None,
    packed: Path,
    report: Report,
) -> str:
    """Upload the packed model; returns MLflow's id of it. One that is complete is used again."""
    from mlflow.entities import LoggedModelOutput

    experiment = store.experiment_id(client)
    for logged in client.search_logged_models([experiment], _same(tags)):
        if str(logged.status) == "READY":
            return str(logged.model_id)
        client.delete_logged_model(logged.model_id)
    logged = client.create_logged_model(
        experiment, config.model_name, source_run_id=run_id, tags=tags, model_type="zero-shot"
    )
    report(1, _STEPS, "packing the model")
    pack(folder, packed, model_id=logged.model_id, run_id=run_id)
    report(2, _STEPS, "uploading the model")
    client.log_model_artifacts(logged.model_id, str(packed / "model"))
    if run_id is not None:
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    client.finalize_logged_model(logged.model_id, "READY")
    return str(logged.model_id)


def pack(
    model: Path, packed: Path, *, model_id: str | None = None, run_id: str | None = None
) -> None:
    """Write `packed/model`: an MLflow model of the saved model in the folder `model`."""
    from mlflow import pyfunc
    from mlflow.models import Model

    shutil.rmtree(packed, ignore_errors=True)
    source = packed / "source" / "evaclip_model"
    shutil.copytree(
        Path(evaclip_model.__file__).parent,
        source,
        ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"),
    )
    pyfunc.save_model(
        str(packed / "model"),
        python_model=str(SERVED),
        artifacts={"model": str(model)},
        code_paths=[str(source)],
        signature=signature(),
        input_example=_example(),
        pip_requirements=[f"{name}=={_public_version(name)}" for name in REQUIREMENTS],
        mlflow_model=Model(model_uuid=model_id, model_id=model_id, run_id=run_id),
    )
    for cache in list((packed / "model").rglob("__pycache__")):
        shutil.rmtree(cache)


def signature() -> ModelSignature:
    """Inputs, outputs and parameters of the registered model."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array, DataType

    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema(
            [ColSpec(DataType.string, "label"), ColSpec(Array(DataType.double), "probabilities")]
        ),
        params=ParamSchema(
            [
                ParamSpec("candidate_labels", DataType.string, [""], shape=(-1,)),
                ParamSpec("output", DataType.string, "probabilities"),
            ]
        ),
    )


def _example() -> tuple[object, dict[str, list[str]]]:
    import pandas

    picture = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 30, 30)).save(picture, "PNG")
    labels = {"candidate_labels": ["a red square", "a dog"]}
    return pandas.DataFrame({"image": [picture.getvalue()]}), labels


def _public_version(distribution: str) -> str:
    """Its version without the local part (`+cpu`), which no package index offers."""
    try:
        return metadata.version(distribution).split("+")[0]
    except metadata.PackageNotFoundError:
        raise InputError(
            f"'{distribution}' is not installed, but the registered model needs it: "
            "install the project with its 'pipeline' extra"
        ) from None
