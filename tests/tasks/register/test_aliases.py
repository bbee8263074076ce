"""What a registered version goes by, asked of a real registry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tasks.register.config import REGISTERED
from tasks.register.model_versions import RegisteredVersion
from tasks.tracking import TrackingStore


def test_aliases_are_those_of_now_not_of_the_registration(tmp_path: Path) -> None:
    store = TrackingStore.at(f"sqlite:///{tmp_path}/mlflow.db", "evaclip")
    client = store.client()
    client.create_registered_model("clip")
    for number in (1, 2):
        client.create_model_version("clip", source=f"file:///nothing/{number}")
    client.set_registered_model_alias("clip", "champion", "1")
    registered = {"name": "clip", "version": 1, "alias": "champion", "tracking_uri": store.uri}
    (tmp_path / REGISTERED).write_text(json.dumps(registered))
    first = RegisteredVersion.from_registration(tmp_path)
    second = RegisteredVersion("clip", 2, store.uri)
    assert (str(first), first.current_aliases(), second.current_aliases()) == (
        "clip/1",
        ("champion",),
        (),
    )
    client.set_registered_model_alias("clip", "champion", "2")
    client.set_registered_model_alias("clip", "best-of-march", "2")
    assert (first.current_aliases(), second.current_aliases()) == (
        (),
        ("best-of-march", "champion"),
    )
    assert RegisteredVersion("clip", 3, store.uri).current_aliases() == (), (
        "deleted from the registry"
    )


@pytest.mark.parametrize("uri", ["sqlite:///{}/gone.db", "http://127.0.0.1:9"])
def test_a_registry_that_does_not_answer_is_told_from_no_alias(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert RegisteredVersion("clip", 1, uri.format(tmp_path)).current_aliases() is None
    assert not (tmp_path / "gone.db").exists()
