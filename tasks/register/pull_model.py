"""A registered model back as a plain folder, for `evaclip` or for another library. Not here:
resolving a name (model_versions.py), writing the other libraries' forms
(evaclip_model/weights/export.py)."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from evaclip_model.choices import Form, Precision
from evaclip_model.errors import InputError
from evaclip_model.weights.checkpoint_files import REFERENCE_FILE, WEIGHTS_FILE, Reference
from tasks.artifacts.artifact import sha256_of
from tasks.progress import Report, report_nothing
from tasks.register.model_versions import list_files, open_registry, resolve_version
from tasks.register.promotion import WEIGHTS_TAG
from tasks.tracking import TrackingStore

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

PULLED = "pulled.json"
_log = logging.getLogger(__name__)
_ROOM: dict[Form, int] = {"native": 1, "open_clip": 2, "timm": 2, "transformers": 2, "onnx": 3}
"""Most bytes on the disk at once, as a multiple of the weights'; ONNX is float32 in any case."""


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
        made = got if as_ == "native" else _export_model(got, beside / "exported", as_)
        about = {"name": version.name, "version": int(version.version), "form": as_}
        (made / PULLED).write_text(json.dumps({**about, "tags": version.tags}, indent=1) + "\n")
        if dest.exists():
            dest.rename(beside / "replaced")
        made.rename(dest)
    report(4, 4, f"{version.name}/{version.version}")
    return dest


def _fetch_model(
    store: TrackingStore,
    source: str,
    beside: Path,
    as_: Form,
    report: Report,
    places: Sequence[str],
) -> Path:
    """The saved model's folder under `beside`, with its weights, wherever they were."""
    from mlflow.artifacts import download_artifacts

    def download(uri: str, folder: Path) -> Path:
        got = download_artifacts(artifact_uri=uri, dst_path=str(folder), tracking_uri=store.uri)
        return Path(got)

    report(0, 4, "looking for room")
    sizes = list_files(store, source)
    if REFERENCE_FILE not in sizes:
        _require_room(beside, sizes.get(WEIGHTS_FILE, 0) * _ROOM[as_])
        report(1, 4, "downloading")
        return download(source, beside)
    folder = download(source, beside)
    reference = Reference.read(folder)
    assert reference is not None, "its file is there"
    _require_place(reference, places)
    _require_room(beside, reference.size * _ROOM[as_])
    report(1, 4, "fetching the weights")
    weights = reference.obtain_weights(beside, download)
    if weights.is_relative_to(beside):
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


def _export_model(folder: Path, dest: Path, as_: Form) -> Path:
    from evaclip_model.create import open_model
    from evaclip_model.weights.export import export_model, export_onnx

    model = open_model(folder, _stored_precision(folder / WEIGHTS_FILE))
    if as_ == "onnx":
        export_onnx(model, dest)
    else:
        export_model(model, dest, as_)
    return dest


def _stored_precision(weights: Path) -> Precision:
    import torch

    from evaclip_model.weights.tensor_files import read_safetensors

    sizes: Counter[torch.dtype] = Counter()
    for tensor in read_safetensors(weights).values():
        sizes[tensor.dtype] += tensor.shape.numel()
    known: dict[torch.dtype, Precision] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    return known.get(sizes.most_common(1)[0][0], "fp32")


def _check_weights(folder: Path, version: ModelVersion) -> None:
    expected, name = version.tags.get(WEIGHTS_TAG), f"{version.name}/{version.version}"
    if not expected:
        said = "%s has no checksum in the registry: nothing confirms that these are its weights"
        _log.warning(said, name)
    elif sha256_of(folder / WEIGHTS_FILE) != expected:
        raise InputError(
            f"the weights of {name} are not those that were registered (sha256 differs): register "
            "the model again"
        )
