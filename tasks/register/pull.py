"""A registered model back as a plain folder, which `evaclip` opens without MLflow.

Covers: resolving NAME@ALIAS and NAME/VERSION, downloading, checking, publishing the folder.
Not here: loading it as an MLflow model (`mlflow.pyfunc.load_model` does that).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from evaclip_model.errors import InputError
from tasks.artifact import sha256_of
from tasks.tracking import TrackingStore, is_refusal

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

PULLED = "pulled.json"
WEIGHTS_TAG = "evaclip.weights_sha256"


def pull(tracking_uri: str, model: str, dest: str | Path) -> Path:
    """Fetch `NAME@ALIAS` or `NAME/VERSION` into the folder `dest`; returns it.

    The folder gets `config.json`, `model.safetensors` and `pulled.json` (name, version, tags). It
    appears whole or not at all; one that an earlier pull made is replaced.

    Raises:
        InputError: no such name, alias or version (says what there is), a folder of other things,
            a store that does not answer, or weights that are not those that were registered.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException

    dest = Path(dest)
    if dest.exists() and not (dest / PULLED).is_file() and (dest.is_file() or any(dest.iterdir())):
        raise InputError(f"{dest} holds other things: give a new or an empty folder")
    store = TrackingStore.at(tracking_uri, experiment="")
    if store.database is not None and not store.database.is_file():
        raise InputError(
            f"there is no registry at {store.uri}: run the pipeline first, or name its address "
            "in EVACLIP_TRACKING_URI"
        )
    beside = dest.with_name(f".{dest.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        client = store.client()
        version = _resolve(client, model)
        source = client.get_model_version_download_uri(version.name, version.version)
        got = Path(
            download_artifacts(
                artifact_uri=f"{source}/artifacts/model",
                dst_path=str(beside),
                tracking_uri=store.uri,
            )
        )
        _check_weights(got, version)
        about = {"name": version.name, "version": int(version.version), "tags": version.tags}
        (got / PULLED).write_text(json.dumps(about, indent=1) + "\n")
        if dest.exists():
            dest.rename(beside / "replaced")
        got.rename(dest)
    except (MlflowException, RequestException) as error:
        raise store.away(error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return dest


def _resolve(client: MlflowClient, model: str) -> ModelVersion:
    """The version that `NAME@ALIAS` or `NAME/VERSION` means, or one sentence with what there is."""
    from mlflow.exceptions import MlflowException

    model = model.removeprefix("models:/")
    name, at, alias = model.partition("@")
    number = ""
    if not at:
        name, _, number = model.partition("/")
    try:
        registered = client.get_registered_model(name)
    except MlflowException as error:
        if not is_refusal(error):
            raise
        names = ", ".join(sorted(known.name for known in client.search_registered_models()))
        raise InputError(
            f"no model '{name}' is registered; there are: {names or 'none yet'}"
        ) from None
    versions = sorted(
        int(known.version) for known in client.search_model_versions(f"name='{name}'")
    )
    if alias in registered.aliases:
        number = str(registered.aliases[alias])
    if number.isdecimal() and int(number) in versions:
        return client.get_model_version(name, number)
    aliases = ", ".join(f"{name}@{known}" for known in sorted(registered.aliases)) or "no alias"
    numbers = ", ".join(f"{name}/{known}" for known in versions) or "no version"
    wrong = f"'{model}' names no version" if at or number else f"'{model}' lacks alias or version"
    raise InputError(f"{wrong}; there are: {aliases}; {numbers}")


def _check_weights(folder: Path, version: ModelVersion) -> None:
    expected = version.tags.get(WEIGHTS_TAG)
    if expected and sha256_of(folder / "model.safetensors") != expected:
        raise InputError(
            f"the weights of {version.name}/{version.version} are not those that were registered "
            "(sha256 differs): register the model again"
        )
