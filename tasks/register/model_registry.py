"""A trained model as a version of a registered model: loadable anywhere, traceable to its rows; and
back as a plain folder, for `evaclip` or for another library. Not here: the model as it runs when
loaded (served_model.py), resolving a name (model_versions.py), whether it replaces the version in
use (gate.py, promotion.py), writing the other libraries' forms (evaclip_model/weights/export.py).

Killed at any moment, the next call finds what is there by its tags and goes on from it. MLflow,
torch, safetensors and Pillow are enough to load a version: what else the tokenizer needs travels
with the source (evaclip_model/tokenizer/bundled_assets.py).
"""

from __future__ import annotations

import base64
import io
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from PIL import Image

import evaclip_model
from evaclip_model.choices import Form
from evaclip_model.errors import InputError
from evaclip_model.files import write_atomically
from evaclip_model.model.model_config import CONFIG_FILE
from evaclip_model.tokenizer.bundled_assets import bundle_assets
from evaclip_model.training.config import MODEL_FOLDER
from evaclip_model.weights.checkpoint_files import REFERENCE_FILE, WEIGHTS_FILE, Reference
from tasks.artifacts import artifact
from tasks.artifacts.root_store import withdraw_manifest
from tasks.progress import Report, report_nothing
from tasks.register.config import COPIED, REGISTERED, LargeWeights, RegisterConfig
from tasks.register.model_versions import list_files, open_registry, resolve_version
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
PULLED = "pulled.json"
_log = logging.getLogger(__name__)
_ROOM: dict[Form, int] = {"native": 1, "open_clip": 2, "timm": 2, "transformers": 2, "onnx": 3}
"""Most bytes on the disk at once, as a multiple of the weights'; ONNX is float32 in any case."""


def register_model(
    config: RegisterConfig,
    trained: artifact.Artifact,
    evaluated: artifact.Artifact,
    store: TrackingStore,
    root: Path,
    out: Path,
    run_id: str | None = None,
    report: Report = report_nothing,
    large: LargeWeights = COPIED,
) -> artifact.Made:
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
    lineage = artifact.lineage_of([evaluated, trained], root)
    digests = sorted(lineage.unique_labels().items())
    tags = {
        DIGEST_TAG: trained.digest,
        WEIGHTS_TAG: artifact.sha256_of(model / WEIGHTS_FILE),
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
    write_atomically(out / artifact.LINEAGE, lineage.to_json())
    write_atomically(out / REGISTERED, json.dumps(registered, indent=1) + "\n")
    report(4, 4, f"{name} version {version.version} is there")
    return artifact.Made(
        {"version": int(version.version)}, (out / REGISTERED, out / artifact.LINEAGE)
    )


def forget_if_gone(address: artifact.Address, store: TrackingStore) -> None:
    """Unfinish a registration whose version the registry no longer has, so that it is made again;
    an alias that somebody moved since is left where it is."""
    if address.is_finished:
        registered = json.loads((address.folder / REGISTERED).read_text())
        about = registered["name"], str(registered["version"])
        with store.connect() as client:
            if find_answer(client.get_model_version, *about) is None:
                withdraw_manifest(address.folder)


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
        (packed / "model" / artifact.LINEAGE).write_text(lineage)


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


def pull_model(
    tracking_uri: str,
    model: str,
    dest: str | Path,
    as_: Form = "native",
    report: Report = report_nothing,
    places: Sequence[str] = (),
) -> Path:
    """Fetch `NAME@ALIAS` or `NAME/VERSION` into the folder `dest`; returns it.

    The folder gets the files of the form (for "native" those of `save_model`) and `pulled.json`
    (name, version, form, tags). It appears whole or not at all; one of an earlier pull is replaced.

    Weights that a version refers to are taken from below `places` alone, folders or URIs, and from
    beside an SQLite registry's database: whoever may write to the registry could otherwise have any
    file of this user copied. A version without a checksum is pulled with a warning.

    Raises:
        InputError: no such name, alias or version (says what there is), a folder of other things,
            a store that does not answer, too little room, weights that are not those that were
            registered, or an architecture that the other library has not.
    """
    dest = Path(dest).absolute()
    if dest.exists() and not (dest / PULLED).is_file() and (dest.is_file() or any(dest.iterdir())):
        raise InputError(f"{dest} holds other things: give a new or an empty folder")
    dest.parent.mkdir(parents=True, exist_ok=True)
    with (
        TemporaryDirectory(dir=dest.parent, prefix=f".{dest.name}.") as folder,  # on the same disk
        open_registry(tracking_uri) as (store, client),
    ):
        beside = Path(folder)
        version = resolve_version(client, model)
        source = client.get_model_version_download_uri(version.name, version.version)
        if store.database is not None:
            places = (*places, str(store.database.parent))
        got = _fetch_model(store, f"{source}/artifacts/model", beside, as_, report, places)
        report(2, 4, "checking the weights")
        _check_weights(got, version)
        report(3, 4, f"writing it as {as_}")
        made = got
        if as_ != "native":
            from evaclip_model.create import open_model  # imports torch, as the next one does
            from evaclip_model.weights.export import export_model

            made = beside / "exported"
            export_model(open_model(got), made, as_)
        about = {"name": version.name, "version": int(version.version), "form": as_}
        (made / PULLED).write_text(json.dumps({**about, "tags": version.tags}, indent=1) + "\n")
        if dest.exists():
            dest.rename(beside / "replaced")
        made.rename(dest)
    report(4, 4, f"{version.name}/{version.version}")
    return dest


def _fetch_model(
    store: TrackingStore, source: str, near: Path, as_: Form, report: Report, places: Sequence[str]
) -> Path:
    """The saved model's folder under `near`, with its weights, wherever they were."""
    from mlflow.artifacts import download_artifacts

    def download(uri: str, folder: Path) -> Path:
        got = download_artifacts(artifact_uri=uri, dst_path=str(folder), tracking_uri=store.uri)
        return Path(got)

    report(0, 4, "looking for room")
    sizes = list_files(store, source)
    if REFERENCE_FILE not in sizes:
        _require_room(near, sizes.get(WEIGHTS_FILE, 0) * _ROOM[as_])
        report(1, 4, "downloading")
        return download(source, near)
    folder = download(source, near)
    reference = Reference.read(folder)
    assert reference is not None, "its file is there"
    _require_place(reference, places)
    _require_room(near, reference.size * _ROOM[as_])
    report(1, 4, "fetching the weights")
    weights = reference.obtain_weights(near, download)
    if weights.is_relative_to(near):
        weights.rename(folder / WEIGHTS_FILE)
    else:
        shutil.copyfile(weights, folder / WEIGHTS_FILE)
    (folder / REFERENCE_FILE).unlink()
    return folder


def _require_place(reference: Reference, places: Sequence[str]) -> None:
    for place in places:
        if "://" not in place:
            place = Path(place).resolve().as_uri()
        if reference.path is not None and place.startswith("file://"):
            folder = Path(unquote(urlsplit(place).path)).resolve()
            is_below = reference.path.resolve().is_relative_to(folder)
        else:
            is_below = reference.uri.startswith(f"{place.rstrip('/')}/")
            is_below = is_below and ".." not in unquote(reference.uri).split("/")
        if is_below:
            return
    raise InputError(
        f"the registry refers to weights at {reference.uri}, which is not below a place that is "
        f"configured for them ({', '.join(places) or 'there is none'}): if you trust it, name its "
        "folder in EVACLIP_REGISTRY_WEIGHTS"
    )


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"the disk of {folder.parent} has {free / 1e9:.1f} GB free and this pull needs "
            f"{needed / 1e9:.1f} GB: free some space, or give a folder on another disk"
        )


def _check_weights(folder: Path, version: ModelVersion) -> None:
    expected, name = version.tags.get(WEIGHTS_TAG), f"{version.name}/{version.version}"
    if missing := [one for one in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / one).is_file()]:
        raise InputError(f"{name} was registered with {missing[0]}, now gone: register it again")
    if not expected:
        said = "%s has no checksum in the registry: nothing confirms that these are its weights"
        _log.warning(said, name)
    elif artifact.sha256_of(folder / WEIGHTS_FILE) != expected:
        raise InputError(
            f"the weights of {name} are not those that were registered (sha256 differs): register "
            "the model again"
        )
