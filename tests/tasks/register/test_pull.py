"""Pulling a version in each form, its weights copied or referred to; never half of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evaclip_model import InputError, open_model
from tasks.artifacts.artifact import sha256_of
from tasks.register import model_registry as pulling
from tasks.register.config import LargeWeights
from tasks.register.model_registry import Form, pull_model
from tasks.tracking import TrackingStore
from tests.tasks.register.registrations import register_random_model, trained_and_evaluated


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def store(root: Path) -> TrackingStore:
    """A registry with one version whose weights are copied, and one that refers to them."""
    store = TrackingStore.at(f"sqlite:///{root}/mlflow.db", "evaclip")
    register_random_model(store, root, "clip", seed=0)
    register_random_model(store, root, "clip", seed=1, large=LargeWeights(0, f"{root}/weights"))
    return store


@pytest.mark.parametrize(
    ("form", "files"),
    [
        ("open_clip", {"open_clip_model.safetensors"}),
        ("timm", {"model.safetensors", "config.json"}),
        ("transformers", {"model.safetensors", "config.json"}),
        pytest.param("onnx", {"image.onnx", "text.onnx"}, marks=pytest.mark.slow),
    ],
)
def test_a_version_comes_in_the_form_of_another_library(
    store: TrackingStore, tmp_path: Path, form: Form, files: set[str]
) -> None:
    folder = pull_model(store.uri, "clip/1", tmp_path / "model", form)
    assert files <= {path.name for path in folder.iterdir()}
    about = json.loads((folder / "pulled.json").read_text())
    assert (about["name"], about["version"], about["form"]) == ("clip", 1, form)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_weights_that_are_referred_to_come_along(
    store: TrackingStore, root: Path, tmp_path: Path
) -> None:
    trained, _ = trained_and_evaluated(root, seed=1)
    registry = root / "mlflow-artifacts"
    assert len(list(registry.rglob("model.safetensors"))) == 1, "of version 1 alone"
    folder = pull_model(store.uri, "clip@champion", tmp_path / "model")
    weights = "model.safetensors"
    assert sha256_of(folder / weights) == sha256_of(trained.folder / "model" / weights)
    assert not (folder / f"{weights}.json").exists()
    open_model(folder)


def test_a_disk_without_room_is_one_sentence_and_nothing_is_left(
    store: TrackingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pulling._ROOM, "native", 10**9)
    for model in ("clip/1", "clip/2"):
        with pytest.raises(InputError, match="GB free and this pull needs"):
            pull_model(store.uri, model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_gone_or_others_leave_what_was_pulled_before(
    store: TrackingStore, root: Path, tmp_path: Path
) -> None:
    folder = pull_model(store.uri, "clip/1", tmp_path / "model")
    before = sha256_of(folder / "model.safetensors")
    (weights,) = (root / "weights").rglob("model.safetensors")
    kept = weights.read_bytes()
    try:
        weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        with pytest.raises(InputError, match="are not those that were registered"):
            pull_model(store.uri, "clip/2", folder)
        weights.unlink()
        with pytest.raises(InputError, match="make that place reachable"):
            pull_model(store.uri, "clip/2", folder)
    finally:
        weights.write_bytes(kept)
    (registered,) = (root / "mlflow-artifacts").rglob("model.safetensors")
    for name in ("model.safetensors", "config.json"):
        registered.with_name(name).rename(root / "taken away")
        with pytest.raises(InputError, match=f"clip/1 was registered with {name}, now gone"):
            pull_model(store.uri, "clip/1", folder)
        (root / "taken away").rename(registered.with_name(name))
    assert sha256_of(folder / "model.safetensors") == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_registry_entry_of_a_stranger_brings_no_file_that_it_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = TrackingStore.at(f"sqlite:///{tmp_path}/runs/mlflow.db", "e")
    client = store.client()
    client.create_registered_model("clip")
    private, model = tmp_path / "id_rsa", tmp_path / "entry" / "artifacts" / "model"
    private.write_text("PRIVATE KEY\n")
    model.mkdir(parents=True)
    (model / "config.json").touch()
    known = sha256_of(private)
    (tmp_path / "runs" / "link").symlink_to(private)

    def pull_reference(uri: str, sha256: str, *places: str) -> Path:
        reference = {"uri": uri, "size": private.stat().st_size, "sha256": sha256}
        (model / "model.safetensors.json").write_text(json.dumps(reference))
        version = client.create_model_version("clip", str(tmp_path / "entry")).version
        return pull_model(store.uri, f"clip/{version}", tmp_path / "dest", places=places)

    for uri in (
        private.as_uri(),
        f"file://{tmp_path}/runs/../id_rsa",
        f"file://{tmp_path}/runs/link",
        "https://host/weights",
    ):
        with pytest.raises(InputError, match="not below a place that is configured"):
            pull_reference(uri, known)
    with pytest.raises(InputError, match="are not those that were registered"):
        pull_reference(private.as_uri(), "0" * 64, str(tmp_path))
    assert not (tmp_path / "dest").exists()
    pull_reference(private.as_uri(), known, str(tmp_path))
    assert "has no checksum in the registry" in caplog.text


def test_files_that_were_moved_away_are_one_sentence_that_names_their_place(tmp_path: Path) -> None:
    store = TrackingStore.at(f"sqlite:///{tmp_path}/mlflow.db", "e")
    client = store.client()
    client.create_registered_model("clip")
    client.create_model_version("clip", f"{tmp_path}/gone")
    with pytest.raises(InputError, match=r"files are not at .*gone.*leave a link"):
        pull_model(store.uri, "clip/1", tmp_path / "dest")
