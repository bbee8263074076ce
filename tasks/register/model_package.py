"""A saved model as an MLflow model: source, weights or where they are, signature, no pickle.

Covers: what is packed, the signature and the example, what a loader needs to have installed;
weights too large to copy into the registry, which are referred to or put into a store.
Not here: the model as it runs when loaded (served_model.py), the registry (model_registry.py),
the reference's form and fetching (evaclip_model/weights/external_weights.py).

MLflow, torch, safetensors and Pillow are enough to load it: what else the tokenizer needs travels
with the source (evaclip_model/tokenizer/bundled_assets.py), and MLflow itself brings the rest.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

import evaclip_model
from evaclip_model.errors import InputError
from evaclip_model.tokenizer.bundled_assets import bundle_assets
from evaclip_model.weights.checkpoint_files import WEIGHTS_FILE
from evaclip_model.weights.external_weights import REFERENCE_FILE, Reference
from tasks.artifacts.provenance import LINEAGE
from tasks.register.config import LargeWeights

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

SERVED = Path(__file__).with_name("served_model.py")
REQUIREMENTS = (
    *("mlflow", "torch", "safetensors", "pillow"),
    *("numpy", "pandas", "pydantic", "wcwidth"),
)
"""Distributions the loaded model imports; those of the second line come with MLflow."""
GB = 10**9
LABELS = ("a red square", "a dog")
CALLS = """\
Load it in Python, with `mlflow`, `torch`, `safetensors` and `pillow` installed:

    model = mlflow.pyfunc.load_model("models:/{name}/{version}")
    model.predict(pandas.DataFrame({{"image": [image_bytes]}}),
                  params={{"candidate_labels": ["a cat", "a dog"]}})        # label, probabilities
    model.predict(pandas.DataFrame({{"image": [image_bytes]}}),
                  params={{"output": "embeddings"}})                        # embedding of an image
    model.predict(pandas.DataFrame({{"text": ["a cat on a mat"]}}))         # embedding of a text

Serve it, and ask over HTTP:

    mlflow models serve -m models:/{name}/{version} --env-manager local -p 5001
    curl http://127.0.0.1:5001/invocations -H 'content-type: application/json' -d '{request}'
"""
"""A version's description in the registry: how to load it and how to serve it."""


def pack_model(
    model: Path,
    packed: Path,
    *,
    reference: Reference | None = None,
    lineage: str | None = None,
    model_id: str | None = None,
    run_id: str | None = None,
) -> None:
    """Write `packed/model`: an MLflow model of the saved model in the folder `model`.

    Args:
        model: what `save_model` wrote.
        packed: made anew.
        reference: where the weights are, if they do not travel with it.
        lineage: what it was made from, as the text of `lineage.json`.
        model_id: MLflow's id of the model.
        run_id: MLflow's id of the run that made it.

    Raises:
        InputError: something is not installed that a loader would need.
    """
    from mlflow import pyfunc
    from mlflow.models import Model

    shutil.rmtree(packed, ignore_errors=True)
    source = packed / "source" / "evaclip_model"
    shutil.copytree(
        Path(evaclip_model.__file__).parent,
        source,
        ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"),
    )
    bundle_assets(source)
    if reference is not None:
        model = _refer_to_weights(model, packed / "source" / "model", reference)
    pyfunc.save_model(
        str(packed / "model"),
        python_model=str(SERVED),
        artifacts={"model": str(model)},
        code_paths=[str(source)],
        signature=make_signature(),
        input_example=_make_example(),
        pip_requirements=[f"{name}=={_public_version(name)}" for name in REQUIREMENTS],
        mlflow_model=Model(model_uuid=model_id, model_id=model_id, run_id=run_id),
        model_config={"device": "cpu"},
    )
    for cache in list((packed / "model").rglob("__pycache__")):
        shutil.rmtree(cache)
    if lineage is not None:
        (packed / "model" / LINEAGE).write_text(lineage)


def make_signature() -> ModelSignature:
    """Inputs, outputs and parameters of the registered model."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array, DataType

    numbers = Array(DataType.double)
    return ModelSignature(
        inputs=Schema(
            [
                ColSpec(DataType.binary, "image", required=False),
                ColSpec(DataType.string, "text", required=False),
            ]
        ),
        outputs=Schema(
            [
                ColSpec(DataType.string, "label", required=False),
                ColSpec(numbers, "probabilities", required=False),
                ColSpec(numbers, "embedding", required=False),
            ]
        ),
        params=ParamSchema(
            [
                ParamSpec("candidate_labels", DataType.string, [""], shape=(-1,)),
                ParamSpec("output", DataType.string, "probabilities"),
            ]
        ),
    )


def version_description(name: str, version: int | str) -> str:
    """A version's description: how to load, call and serve it."""
    request = {
        "dataframe_split": {
            "columns": ["image"],
            "data": [[base64.b64encode(_example_picture()).decode()]],
        },
        "params": {"candidate_labels": list(LABELS)},
    }
    return CALLS.format(name=name, version=version, request=json.dumps(request))


def _refer_to_weights(model: Path, folder: Path, reference: Reference) -> Path:
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns(WEIGHTS_FILE))
    (folder / REFERENCE_FILE).write_text(reference.model_dump_json(indent=1) + "\n")
    return folder


def _make_example() -> tuple[object, dict[str, list[str]]]:
    import pandas

    return pandas.DataFrame({"image": [_example_picture()]}), {"candidate_labels": list(LABELS)}


def _example_picture() -> bytes:
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 30, 30)).save(picture, "PNG")
    return picture.getvalue()


def _public_version(distribution: str) -> str:
    """Its version without the local part (`+cpu`), which no package index offers."""
    try:
        return metadata.version(distribution).split("+")[0]
    except metadata.PackageNotFoundError:
        raise InputError(
            f"'{distribution}' is not installed, but the registered model needs it: "
            "install the project with its 'pipeline' extra"
        ) from None


def reference_to(model: Path, sha256: str, large: LargeWeights) -> Reference | None:
    """The reference to the weights of a saved model, put into their place; None for a copy.

    Raises:
        InputError: the place does not take them.
    """
    weights = model / WEIGHTS_FILE
    size = weights.stat().st_size
    if size <= large.above_gb * GB:
        return None
    uri = _put_weights(weights, f"{large.place.rstrip('/')}/{sha256}") if large.place else ""
    return Reference(uri=uri or weights.resolve().as_uri(), size=size, sha256=sha256)


def _put_weights(weights: Path, folder: str) -> str:
    """Put a file into a store's folder, unless one of its size is there; returns the file's URI."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    if "://" not in folder:
        folder = Path(folder).resolve().as_uri()
    try:
        repository = get_artifact_repository(folder)
        sizes = {Path(file.path).name: file.file_size for file in repository.list_artifacts()}
        if sizes.get(weights.name) != weights.stat().st_size:
            repository.log_artifact(str(weights))
    except Exception as error:  # every store has errors of its own
        raise InputError(
            f"the weights cannot be put into {folder} ({type(error).__name__}: "
            f"{str(error)[:160]}): mend it, or name another place in EVACLIP_REGISTRY_WEIGHTS"
        ) from error
    return f"{folder}/{weights.name}"
