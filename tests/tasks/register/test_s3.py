"""The registry over a real S3 server: `make check-infra` starts one and says where it is.

EVACLIP_TEST_S3_URL is its address; AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY open it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from evaclip_model import InputError, open_model
from evaclip_model.ports import find_free_port
from evaclip_model.weights.checkpoint_files import Reference
from tasks.artifacts.artifact import sha256_of
from tasks.register.config import COPIED, LargeWeights
from tasks.register.model_registry import pull_model, reference_to
from tasks.tracking import TrackingStore
from tests.tasks.register.registrations import register_random_model, trained_and_evaluated
from tests.tasks.register.servers import mlflow_server

URL = os.environ.get("EVACLIP_TEST_S3_URL", "")
pytestmark = [
    pytest.mark.skipif(not URL, reason="EVACLIP_TEST_S3_URL names no S3 server"),
    pytest.mark.timeout(900),
]

LOAD = """
    import importlib.util, json, os, sys, tempfile
    for name in ("tasks", "evaclip_model"):
        assert importlib.util.find_spec(name) is None
    import mlflow, pandas
    mlflow.set_tracking_uri(sys.argv[1])
    model = mlflow.pyfunc.load_model("models:/clip@champion", dst_path=sys.argv[2])
    answer = model.predict(pandas.DataFrame({"text": ["a red apple"]}))
    left = [name for name in os.listdir(tempfile.gettempdir()) if name.startswith("evaclip-")]
    print(json.dumps([sum(x * x for x in answer.embedding[0]), left]))
"""


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket of its own."""
    import boto3

    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", URL)
    monkeypatch.setenv("AWS_DEFAULT_REGION", os.environ.get("AWS_DEFAULT_REGION", "us-east-1"))
    name = f"evaclip-{uuid.uuid4().hex[:12]}"
    store = boto3.resource("s3", endpoint_url=URL).Bucket(name)
    store.create()
    yield f"s3://{name}"
    store.objects.all().delete()
    store.delete()


def load_elsewhere(uri: str, folder: Path, settings: dict[str, str]) -> list[object]:
    """Length of an embedding from a fresh process without this project, and files left behind."""
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    copy, temporary = folder / "copy", folder / "temporary"
    for made in (copy, temporary):
        made.mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-S", "-c", textwrap.dedent(LOAD), uri, str(copy)],
        cwd=folder,
        env={**settings, "PYTHONPATH": packages, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("way", ["through the server", "direct", "referred to"])
def test_a_version_on_s3_is_registered_loaded_elsewhere_and_pulled(
    bucket: str, tmp_path: Path, way: str
) -> None:
    """Through the server, its clients know nothing of S3; else they have keys of their own."""
    port = find_free_port()
    direct = ("--no-serve-artifacts", "--default-artifact-root", f"{bucket}/mlflow")
    artifacts = ("--artifacts-destination", f"{bucket}/mlflow")
    artifacts = artifacts if way == "through the server" else direct
    large = LargeWeights(0, f"{bucket}/weights") if way == "referred to" else COPIED
    settings = dict(os.environ)
    if way == "through the server":
        settings = {k: v for k, v in settings.items() if not k.startswith(("AWS_", "MLFLOW_S3"))}
    with mlflow_server(tmp_path / "server", port, artifacts):
        store = TrackingStore.at(f"http://127.0.0.1:{port}", "s3")
        register_random_model(store, tmp_path / "runs", "clip", large=large)
        length, left = load_elsewhere(store.uri, tmp_path / "elsewhere", settings)
        assert length == pytest.approx(1, abs=1e-4)
        assert left == []
        folder = pull_model(
            store.uri, "clip@champion", tmp_path / "pulled", places=[f"{bucket}/weights"]
        )
    open_model(folder)
    trained, _ = trained_and_evaluated(tmp_path / "runs")
    weights = "model.safetensors"
    assert sha256_of(folder / weights) == sha256_of(trained.folder / "model" / weights)
    assert not list((tmp_path / "server").rglob(weights))


PUT = """
    import sys
    from pathlib import Path
    from evaclip_model import InputError
    from tasks.register.config import LargeWeights
    from tasks.register.model_registry import reference_to
    try:
        reference_to(Path(sys.argv[1]), "0" * 64, LargeWeights(0, sys.argv[2]))
    except InputError as error:
        print(error)
"""


def test_other_keys_are_refused_in_one_sentence(bucket: str, tmp_path: Path) -> None:
    """In a process of its own: MLflow keeps a client that was let in."""
    trained, _ = trained_and_evaluated(tmp_path)
    settings = {**os.environ, "AWS_SECRET_ACCESS_KEY": "not-the-key-of-this-server"}
    model = str(trained.folder / "model")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PUT), model, f"{bucket}/weights"],
        **{"env": settings, "capture_output": True, "text": True},
    )
    assert done.returncode == 0, done.stderr
    (sentence,) = done.stdout.splitlines()
    assert "cannot be put into" in sentence and "EVACLIP_REGISTRY_WEIGHTS" in sentence


def test_other_bytes_at_the_place_are_not_loaded(bucket: str, tmp_path: Path) -> None:
    import mlflow

    trained, _ = trained_and_evaluated(tmp_path)
    model = trained.folder / "model"
    sha256 = sha256_of(model / "model.safetensors")
    reference = reference_to(model, sha256, LargeWeights(0, f"{bucket}/weights"))
    assert reference is not None

    def download(uri: str, folder: Path) -> Path:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder)))

    reference.obtain_weights(tmp_path, download)
    other = Reference(uri=reference.uri, size=reference.size, sha256="0" * 64)
    with pytest.raises(InputError, match="not those that were registered"):
        other.obtain_weights(tmp_path, download)
