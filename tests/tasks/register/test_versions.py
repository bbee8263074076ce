"""Versions by what people call them, the lineage they carry, and the champion before."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.artifacts.artifact import Change, list_changes
from tasks.register.model_versions import describe_version, find_predecessor, is_address, made_from
from tasks.register.promotion import roll_back
from tasks.tracking import TrackingStore
from tests.tasks.register.registrations import register_random_model, trained_and_evaluated


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def store(root: Path) -> TrackingStore:
    """Two versions, one after the other the champion."""
    store = TrackingStore.at(f"sqlite:///{root}/mlflow.db", "evaclip")
    for seed in range(2):
        register_random_model(store, root, "clip", seed)
    return store


def test_a_version_carries_what_it_was_made_from(store: TrackingStore, root: Path) -> None:
    trained, evaluated = trained_and_evaluated(root, seed=1)
    version = describe_version(store.uri, "models:/clip@champion")
    assert (str(version), version.aliases) == ("clip/2", ("challenger", "champion"))
    assert version.lineage is not None
    assert version.lineage.heads == (evaluated.digest, trained.digest)
    assert made_from(store.uri, trained.digest) == ["clip/2"]


def test_a_version_is_found_behind_a_page_of_other_models(
    store: TrackingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = store.client()
    for number in range(3):
        client.create_registered_model(f"a-{number}")
        client.create_model_version(f"a-{number}", "file:///nothing")
    search = type(client).search_model_versions
    monkeypatch.setattr(
        type(client),
        "search_model_versions",
        lambda self, query=None, page_token=None: search(self, query, 2, page_token=page_token),
    )
    digest = describe_version(store.uri, "clip/1").tags["evaclip.digest"]
    assert made_from(store.uri, digest) == ["clip/1"]


def test_a_champion_is_compared_with_the_one_before(store: TrackingStore) -> None:
    first, second = (describe_version(store.uri, f"clip/{number}") for number in (1, 2))
    assert find_predecessor(store.uri, first, "champion") is None
    before = find_predecessor(store.uri, second, "champion")
    assert before is not None and before.version == 1
    assert before.lineage is not None and second.lineage is not None
    assert list_changes(before.lineage, second.lineage) == [Change("train.stage-1: seed", 0, 1)]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("clip@champion", True),
        ("models:/clip/3", True),
        ("clip/3", True),
        ("laion2b", False),
        ("5717e0877830e9aa", False),
        ("13402500", False),
    ],
)
def test_a_models_address_is_told_from_a_digest_and_a_source(word: str, expected: bool) -> None:
    assert is_address(word) is expected


def test_a_version_that_was_rolled_back_is_compared_with_the_champion(store: TrackingStore) -> None:
    roll_back(store, "clip", "champion", None, "me", "it was worse")
    before = find_predecessor(store.uri, describe_version(store.uri, "clip/2"), "champion")
    assert before is not None and before.version == 1
