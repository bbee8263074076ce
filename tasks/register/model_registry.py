"""A trained model as a version of a registered model: loadable anywhere, traceable to its rows. Not
here: the model as it runs when loaded (served_model.py), pulling it back (pull_model.py), whether
it replaces the version in use (gate.py, promotion.py).

Killed at any moment, the next call finds what is there by its tags and goes on from it. MLflow,
torch, safetensors and Pillow are enough to load a version: what else the tokenizer needs travels
with the source (evaclip_model/tokenizer/bundled_assets.py).
"""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from PIL import Image

import evaclip_model
from evaclip_model.errors import InputError
from evaclip_model.files import write_atomically
from evaclip_model.tokenizer.bundled_assets import bundle_assets
from evaclip_model.training.config import MODEL_FOLDER
from evaclip_model.weights.checkpoint_files import REFERENCE_FILE, WEIGHTS_FILE, Reference
from tasks.artifacts.artifact import (
    LINEAGE,
    MANIFEST,
    Address,
    Artifact,
    Made,
    lineage_of,
    sha256_of,
)
from tasks.progress import Report, report_nothing
from tasks.register.config import COPIED, REGISTERED, LargeWeights, RegisterConfig
from tasks.register.promotion import DIGEST_TAG, WEIGHTS_TAG
from tasks.tracking import TrackingStore, find_answer, restore_run

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

REQUIREMENTS = (
    *("mlflow", "torch", "safetensors", "pillow"),
    *("numpy", "pandas", "pydantic", "wcwidth"),
)
"""Distributions the loaded model imports; those of the second line come with MLflow."""
GB = 10**9
LABELS = ("a red square", "a dog")


def register_model(
    config: RegisterConfig,
    trained: Artifact,
    evaluated: Artifact,
    store: TrackingStore,
    root: Path,
    out: Path,
    run_id: str | None = None,
    report: Report = report_nothing,
    large: LargeWeights = COPIED,
) -> Made:
    """Register `trained` under the config's name as a candidate, write `registered.json`.

    Args:
        evaluated: the evaluation whose figures become tags of the version.
        root: of all artifacts, to find the ancestors whose digests become tags.
        run_id: MLflow run that made the model, when it is known; the version links to it.
        large: what becomes of weights too large for the registry.

    Raises:
        InputError: the store does not answer, or does not take the weights.
    """
    model, packed, name = trained.folder / MODEL_FOLDER, out / "packed", config.model_name
    lineage = lineage_of([evaluated, trained], root)
    digests = sorted(lineage.unique_labels().items())
    tags = {
        DIGEST_TAG: trained.digest,
        WEIGHTS_TAG: sha256_of(model / WEIGHTS_FILE),
        **{f"{DIGEST_TAG}.{label}": digest for label, digest in digests},
        **{f"evaluation.{metric}": f"{value:g}" for metric, value in evaluated.counts.items()},
    }
    with store.connect() as client, ExitStack() as leavings:
        leavings.callback(shutil.rmtree, packed, ignore_errors=True)
        report(0, 4, "looking for the same model")
        if run_id is not None and not restore_run(client, run_id):
            run_id = None  # gone for good: the model is of no run
        found = client.search_model_versions(f"name = '{name}' and {_is_same(tags)}")
        if found:
            version = found[0]
        else:

            def pack(model_id: str) -> Path:
                report(1, 4, "packing the model")
                pack_model(
                    *(model, packed),
                    reference=reference_to(model, tags[WEIGHTS_TAG], large),
                    lineage=lineage.to_json(),
                    model_id=model_id,
                    run_id=run_id,
                )
                report(2, 4, "uploading the model")
                return packed / "model"

            version = _make_version(client, store, name, tags, run_id, pack, report)
        client.set_registered_model_alias(name, config.candidate_alias, version.version)
    registered = {
        "name": name,
        "version": int(version.version),
        "alias": config.candidate_alias,
        "uri": f"models:/{name}/{version.version}",
        "tracking_uri": store.uri,
    }
    write_atomically(out / LINEAGE, lineage.to_json())
    write_atomically(out / REGISTERED, json.dumps(registered, indent=1) + "\n")
    report(4, 4, f"{name} version {version.version} is there")
    return Made({"version": int(version.version)}, (out / REGISTERED, out / LINEAGE))


def forget_if_gone(address: Address, store: TrackingStore) -> None:
    """Unfinish a registration whose version the registry no longer has, so that it is made again;
    an alias that somebody moved since is left where it is."""
    if address.is_finished:
        registered = json.loads((address.folder / REGISTERED).read_text())
        about = registered["name"], str(registered["version"])
        with store.connect() as client:
            if find_answer(client.get_model_version, *about) is None:
                (address.folder / MANIFEST).unlink()


def _is_same(tags: dict[str, str]) -> str:
    """MLflow's filter for these very weights, made from this very chain."""
    return " and ".join(f"tags.`{tag}` = '{tags[tag]}'" for tag in (DIGEST_TAG, WEIGHTS_TAG))


def _make_version(
    client: MlflowClient,
    store: TrackingStore,
    name: str,
    tags: dict[str, str],
    run_id: str | None,
    pack: Callable[[str], Path],
    report: Report,
) -> ModelVersion:
    """A new version of what `pack` makes for MLflow's id of it, unless that is uploaded already."""
    from mlflow.entities import LoggedModelOutput

    experiment, logged = store.experiment_id(client), None
    for known in client.search_logged_models([experiment], _is_same(tags)):
        if str(known.status) == "READY":
            logged = known
            break
        client.delete_logged_model(known.model_id)
    if logged is None:
        logged = client.create_logged_model(experiment, name, run_id, tags, model_type="zero-shot")
        client.log_model_artifacts(logged.model_id, str(pack(logged.model_id)))
        if run_id is not None:
            client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        client.finalize_logged_model(logged.model_id, "READY")
    report(3, 4, f"registering {name}")
    find_answer(client.create_registered_model, name)  # it may be there
    # A server wants the id, to check that the source belongs to it. MLflow's own SQLite store would
    # look the id up in whatever store the process has as its global one.
    checked_id = logged.model_id if store.database is None else None
    source = logged.artifact_location
    version = client.create_model_version(name, source, run_id, tags, model_id=checked_id)
    described = version_description(name, version.version)
    return client.update_model_version(name, version.version, described)


def pack_model(
    model: Path,
    packed: Path,
    *,
    reference: Reference | None = None,
    lineage: str | None = None,
    model_id: str | None = None,
    run_id: str | None = None,
) -> None:
    """Write `packed/model`: an MLflow model of what `save_model` wrote into the folder `model`,
    with a `reference` to weights that do not travel with it, and the text of `lineage.json`."""
    import pandas
    from mlflow import pyfunc
    from mlflow.models import Model

    shutil.rmtree(packed, ignore_errors=True)
    source = packed / "source" / "evaclip_model"
    hidden = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    shutil.copytree(Path(evaclip_model.__file__).parent, source, ignore=hidden)
    bundle_assets(source)
    if reference is not None:
        beside = packed / "source" / "model"
        shutil.copytree(model, beside, ignore=shutil.ignore_patterns(WEIGHTS_FILE))
        (beside / REFERENCE_FILE).write_text(reference.model_dump_json(indent=1) + "\n")
        model = beside
    example = pandas.DataFrame({"image": [_example_picture()]})
    pyfunc.save_model(
        str(packed / "model"),
        python_model=str(Path(__file__).with_name("served_model.py")),
        artifacts={"model": str(model)},
        code_paths=[str(source)],
        signature=make_signature(),
        input_example=(example, {"candidate_labels": list(LABELS)}),
        # without the local part of a version (`+cpu`), which no package index offers
        pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in REQUIREMENTS],
        mlflow_model=Model(model_uuid=model_id, model_id=model_id, run_id=run_id),
        model_config={"device": "cpu", "max_rows": None},
    )
    for cache in list((packed / "model").rglob("__pycache__")):
        shutil.rmtree(cache)
    if lineage is not None:
        (packed / "model" / LINEAGE).write_text(lineage)


def make_signature() -> ModelSignature:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array, DataType

    numbers, text = Array(DataType.double), DataType.string
    inputs = {"image": DataType.binary, "text": text}
    outputs = {"label": text, "probabilities": numbers, "embedding": numbers, "error": text}
    schemas = [
        Schema([ColSpec(kind, name, required=False) for name, kind in columns.items()])
        for columns in (inputs, outputs)
    ]
    labels = ParamSpec("candidate_labels", text, [""], shape=(-1,))
    output = ParamSpec("output", text, "probabilities")
    errors = ParamSpec("errors", text, "raise")
    return ModelSignature(*schemas, ParamSchema([labels, output, errors]))


def version_description(name: str, number: int | str) -> str:
    """A version's description: how to load, call and serve it."""
    image = base64.b64encode(_example_picture()).decode()
    request = {
        "dataframe_split": {"columns": ["image"], "data": [[image]]},
        "params": {"candidate_labels": list(LABELS)},
    }
    described = Template(Path(__file__).with_name("version.md").read_text())
    return described.substitute(name=name, version=number, request=json.dumps(request))


def _example_picture() -> bytes:
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 30, 30)).save(picture, "PNG")
    return picture.getvalue()


def reference_to(model: Path, sha256: str, large: LargeWeights) -> Reference | None:
    """The reference to the weights of a saved model, put into their place; None for a copy.
    InputError: the place does not take them."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    weights = model / WEIGHTS_FILE
    size = weights.stat().st_size
    if size <= large.above_gb * GB:
        return None
    if not large.place:
        return Reference(uri=weights.resolve().as_uri(), size=size, sha256=sha256)
    folder = f"{large.place.rstrip('/')}/{sha256}"
    if "://" not in folder:
        folder = Path(folder).resolve().as_uri()
    try:
        repository = get_artifact_repository(folder)
        sizes = {Path(file.path).name: file.file_size for file in repository.list_artifacts()}
        if sizes.get(weights.name) != size:  # unless it is there
            repository.log_artifact(str(weights))
    except Exception as error:  # every store has errors of its own
        raise InputError(
            f"the weights cannot be put into {folder} ({type(error).__name__}: "
            f"{str(error)[:160]}): mend it, or name another place in EVACLIP_REGISTRY_WEIGHTS"
        ) from error
    return Reference(uri=f"{folder}/{weights.name}", size=size, sha256=sha256)
