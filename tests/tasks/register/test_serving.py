"""`mlflow models serve` of a registered version, asked with curl."""

from __future__ import annotations

import base64
import io
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tasks.tracking import TrackingStore
from tests.tasks.register.registrations import register_random_model
from tests.tasks.register.servers import model_server


def ask(address: str, column: str, value: object, **params: object) -> tuple[int, Any]:
    """Status and answer to one row, asked with curl."""
    rows = {"dataframe_split": {"columns": [column], "data": [[value]]}, "params": params}
    command = ["curl", "-sS", "-w", "\n%{http_code}", "-H", "content-type: application/json"]
    done = subprocess.run(
        [*command, "-d", "@-", address], input=json.dumps(rows), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    body, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(body)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("served")
    store = TrackingStore.at(f"sqlite:///{root}/mlflow.db", "evaclip")
    register_random_model(store, root, "served")
    with model_server(root, store.uri, "models:/served@champion") as address:
        yield address


def test_a_served_model_answers_curl_and_opens_no_file(address: str, tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(picture, "PNG")
    image = base64.b64encode(picture.getvalue()).decode()
    labels = ["a red apple", "a dog"]

    status, answer = ask(address, "image", image, candidate_labels=labels)
    (row,) = answer["predictions"]
    assert (status, set(row)) == (200, {"label", "probabilities"})
    assert row["label"] in labels and sum(row["probabilities"]) == pytest.approx(1)

    for column, value in (("image", image), ("text", "a red apple")):
        status, answer = ask(address, column, value, output="embeddings")
        (row,) = answer["predictions"]
        assert (status, set(row)) == (200, {"embedding"})
        assert sum(x * x for x in row["embedding"]) == pytest.approx(1, abs=1e-4)

    (tmp_path / "secret.png").write_bytes(picture.getvalue())
    for path in (f"{tmp_path}/secret.png", f"file://{tmp_path}/secret.png", "/etc/passwd===="):
        status, answer = ask(address, "image", path, candidate_labels=labels)
        assert status == 400 and "predictions" not in answer, path
    status, answer = ask(address, "image", image)
    assert status == 400 and "give the labels to choose from" in answer["message"]
    assert "Traceback" not in json.dumps(answer)
