"""Aliases and their history in a real registry: promoted, refused, forced, rolled back, killed."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest
from hypothesis import given, strategies as some
from mlflow import MlflowClient

from evaclip_model import InputError
from flows.graph.ancestry import version_tree
from tasks.register.config import GatePolicy, RegisterConfig
from tasks.register.gate import Candidate, Champion, Decision, GateOutcome, decide_promotion
from tasks.register.model_registry import pull_model
from tasks.register.model_versions import describe_version
from tasks.register.promotion import (
    HISTORY_TAG,
    Move,
    Waiting,
    carry_out,
    champion_history,
    champion_of,
    decline_version,
    history,
    promote_version,
    read_decision,
    require_champion,
    roll_back,
    standing_of,
    waits_for,
    write_decision,
)
from tasks.tracking import TrackingStore
from tests.tasks.register.registrations import register_random_model

TAG = f"{HISTORY_TAG}.champion."
CONFIG = RegisterConfig(model_name="clip")
FIRST = decide_promotion(Candidate(weights="w1", bytes=1, headlines=()), None, GatePolicy())


def better_than(version: int) -> Decision:
    champion = Champion(version=version, weights="old", bytes=1)
    tie = decide_promotion(Candidate(weights="new", bytes=1, headlines=()), champion, GatePolicy())
    return tie.model_copy(update={"outcome": FIRST.outcome})


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A database without a model, made once."""
    folder = tmp_path_factory.mktemp("empty")
    TrackingStore.at(f"sqlite:///{folder}/mlflow.db", "e").client()
    return (folder / "mlflow.db").read_bytes()


@pytest.fixture
def store(tmp_path: Path, empty: bytes) -> TrackingStore:
    """A registry with three versions, none of which is champion."""
    (tmp_path / "mlflow.db").write_bytes(empty)
    store = TrackingStore.at(f"sqlite:///{tmp_path}/mlflow.db", "e")
    client = store.client()
    client.create_registered_model("clip")
    for number in (1, 2, 3):
        client.create_model_version("clip", source=f"file:///nothing/{number}")
    return store


def alias(store: TrackingStore) -> int | None:
    champion = champion_of(store, "clip", "champion")
    return champion and champion.version


def move(version: int, how: str = "gate") -> Move:
    return Move("", version, how, "me", "")  # type: ignore[arg-type]


def test_before_the_first_model_there_is_no_champion(tmp_path: Path, empty: bytes) -> None:
    (tmp_path / "mlflow.db").write_bytes(empty)
    store = TrackingStore.at(f"sqlite:///{tmp_path}/mlflow.db", "e")
    assert champion_of(store, "clip", "champion") is None
    assert history(store, "clip", "champion") == []


def test_the_gates_word_is_carried_out_once_and_written_down(store: TrackingStore) -> None:
    assert carry_out(store, CONFIG, 1, FIRST)
    assert not carry_out(store, CONFIG, 1, FIRST)
    assert alias(store) == 1
    (only,) = history(store, "clip", "champion")
    assert (only.version, only.how, only.by, only.why) == (
        *(1, "gate", "gate"),
        "PROMOTE: no champion yet",
    )


def test_a_word_about_another_champion_is_not_carried_out_but_stale(store: TrackingStore) -> None:
    carry_out(store, CONFIG, 1, FIRST)
    promote_version(store, "clip", "champion", 3, "force", "me", "a hunch")
    assert not carry_out(store, CONFIG, 2, better_than(1))
    assert waits_for(store, CONFIG, 2, better_than(1)) is Waiting.STALE
    assert alias(store) == 3


def test_a_word_that_waits_is_due_and_not_stale(store: TrackingStore) -> None:
    carry_out(store, CONFIG, 1, FIRST)
    assert waits_for(store, CONFIG, 2, better_than(1)) is Waiting.DUE


def test_a_killed_promotion_is_written_down_by_the_next_one(store: TrackingStore) -> None:
    carry_out(store, CONFIG, 1, FIRST)
    store.client().set_registered_model_alias("clip", "champion", "2")  # and killed here
    assert waits_for(store, CONFIG, 2, better_than(1)) is Waiting.DUE
    assert carry_out(store, CONFIG, 2, better_than(1))
    assert [(m.version, m.how) for m in history(store, "clip", "champion")] == [
        (1, "gate"),
        (2, "gate"),
    ]


def test_an_alias_that_somebody_moved_is_written_down_too(store: TrackingStore) -> None:
    carry_out(store, CONFIG, 1, FIRST)
    store.client().set_registered_model_alias("clip", "champion", "3")
    promote_version(store, "clip", "champion", 2, "force", "me", "better in use")
    assert [(m.version, m.how) for m in history(store, "clip", "champion")] == [
        *((1, "gate"), (3, "outside")),
        (2, "force"),
    ]


def test_a_rolled_back_version_is_not_promoted_again_by_its_old_word(store: TrackingStore) -> None:
    carry_out(store, CONFIG, 1, FIRST)
    carry_out(store, CONFIG, 2, better_than(1))
    assert roll_back(store, "clip", "champion", None, "me", "slow") == (2, 1)
    assert alias(store) == 1
    assert not carry_out(store, CONFIG, 2, better_than(1))
    assert waits_for(store, CONFIG, 2, better_than(1)) is Waiting.NOTHING
    assert history(store, "clip", "champion")[-1].how == "rollback"


def test_rolling_back_twice_goes_back_twice_and_then_says_what_to_do(store: TrackingStore) -> None:
    for version in (1, 2, 3):
        promote_version(store, "clip", "champion", version, "force", "me", "test")
    roll_back(store, "clip", "champion", None, "me", "")
    assert roll_back(store, "clip", "champion", None, "me", "") == (2, 1)
    with pytest.raises(InputError, match="--to VERSION"):
        roll_back(store, "clip", "champion", None, "me", "")
    assert roll_back(store, "clip", "champion", 3, "me", "") == (1, 3)
    assert alias(store) == 3


def test_a_version_or_model_that_is_not_there_is_one_sentence(store: TrackingStore) -> None:
    with pytest.raises(InputError, match="'clip' has no version 9; there are: 1, 2, 3"):
        promote_version(store, "clip", "champion", 9, "force", "me", "")
    with pytest.raises(InputError, match="'clap' has no version 1; there are: none"):
        promote_version(store, "clap", "champion", 1, "force", "me", "")
    with pytest.raises(InputError, match="no version of 'clip' is champion"):
        roll_back(store, "clip", "champion", None, "me", "")


def test_a_no_is_kept_and_ends_the_waiting(store: TrackingStore) -> None:
    carry_out(store, CONFIG, 1, FIRST)
    decline_version(store, "clip", 2, "Ada", "the captions look wrong")
    assert standing_of(store, "clip", 2).declined == "Ada: the captions look wrong"
    assert waits_for(store, CONFIG, 2, better_than(1)) is Waiting.NOTHING


def test_a_refusal_is_a_file_a_page_and_tags_of_the_version(
    store: TrackingStore, tmp_path: Path
) -> None:
    held = decide_promotion(
        Candidate(weights="w2", bytes=9, headlines=()),
        Champion(version=1, weights="w", bytes=1),
        GatePolicy(),
    )
    files = write_decision(store, "clip", 2, held, tmp_path)
    assert read_decision(tmp_path) == held
    assert files[1].read_text().startswith("# clip/2: REJECT")
    tags = store.client().get_model_version("clip", "2").tags
    assert (tags["evaclip.gate"], tags["evaclip.gate.reasons"]) == ("reject", held.summary)
    assert standing_of(store, "clip", 2).gate == "reject"


def test_a_registry_that_is_away_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    store = TrackingStore.at("http://127.0.0.1:9", "e")
    with pytest.raises(InputError, match="does not answer"):
        champion_of(store, "clip", "champion")


def test_what_others_registered_has_no_digest(store: TrackingStore) -> None:
    client: MlflowClient = store.client()
    client.set_registered_model_alias("clip", "champion", "1")
    champion = champion_of(store, "clip", "champion")
    assert champion is not None
    assert (champion.digest, champion.weights) == ("", "")


@given(some.lists(some.integers(1, 5), max_size=8))
def test_without_rollbacks_the_line_is_every_change(versions: list[int]) -> None:
    line = champion_history([move(version) for version in versions])
    assert line == [v for place, v in enumerate(versions) if place == 0 or versions[place - 1] != v]


@given(some.lists(some.integers(1, 5), min_size=1, max_size=8))
def test_going_back_step_by_step_ends_at_the_first(versions: list[int]) -> None:
    moves = [move(version) for version in versions]
    first = champion_history(moves)[0]
    while len(champion_history(moves)) > 1:
        before = champion_history(moves)
        moves.append(move(before[-2], "rollback"))
        assert len(champion_history(moves)) < len(before)
        assert champion_history(moves)[-1] == before[-2]
    assert champion_history(moves)[0] == first


@pytest.mark.parametrize("deleted", ["alias", "version"])
def test_versions_without_a_champion_that_had_one_are_no_first_model(
    store: TrackingStore, deleted: str
) -> None:
    assert require_champion(store, "clip", "champion") is None
    assert carry_out(store, CONFIG, 1, FIRST)
    if deleted == "alias":
        store.client().delete_registered_model_alias("clip", "champion")
    else:
        store.client().delete_model_version("clip", "1")
    way = {"alias": "promote clip/1", "version": "deleted the version: .* promote clip/VERSION"}
    with pytest.raises(InputError, match=rf"version 1 was.*{way[deleted]}"):
        require_champion(store, "clip", "champion")
    assert not carry_out(store, CONFIG, 2, FIRST), "it was compared with nothing"
    assert promote_version(store, "clip", "champion", 3, "force", "me", "to go on")
    found = require_champion(store, "clip", "champion")
    assert found is not None and found.version == 3


@pytest.mark.parametrize("written", ["mine now", "[1]", '{"how": "gate", "who": "me"}', ""])
def test_a_record_that_somebody_edited_is_still_one(store: TrackingStore, written: str) -> None:
    assert carry_out(store, CONFIG, 1, FIRST)
    client = store.client()
    (key,) = (tag for tag in client.get_model_version("clip", "1").tags if tag.startswith(TAG))
    client.set_model_version_tag("clip", "1", key, written)
    client.set_registered_model_tag("clip", f"{HISTORY_TAG}.champion", "the first")
    (only,) = history(store, "clip", "champion")
    assert (only.version, only.how, only.by) == (1, "outside", "unknown")
    client.delete_registered_model_alias("clip", "champion")
    assert not carry_out(store, CONFIG, 2, FIRST), "version 1 was champion"
    with pytest.raises(InputError, match="version 1 was"):
        require_champion(store, "clip", "champion")


def test_a_model_that_somebody_renamed_is_said_so_and_nothing_is_first_again(
    store: TrackingStore,
) -> None:
    assert carry_out(store, CONFIG, 1, FIRST)
    client = store.client()
    client.rename_registered_model("clip", "clip-of-bob")
    with pytest.raises(InputError, match=r"renamed 'clip' to 'clip-of-bob'.*rename it back"):
        require_champion(store, "clip", "champion")
    client.rename_registered_model("clip-of-bob", "clip")
    champion = require_champion(store, "clip", "champion")
    assert champion is not None and champion.version == 1
    assert len(history(store, "clip", "champion")) == 1


def test_a_model_that_somebody_deleted_whole_is_not_begun_anew_without_comparison(
    store: TrackingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered = register_random_model(store, tmp_path, "whole")
    client = store.client()
    source = client.get_model_version("whole", str(registered.counts["version"])).source
    model_id = Path(source).parent.name
    client.delete_registered_model("whole")
    with pytest.raises(InputError, match=rf"{model_id} was, until somebody deleted 'whole'"):
        require_champion(store, "whole", "champion")
    assert require_champion(store, "whole", "another") is None
    client.create_registered_model("whole")
    client.create_model_version("whole", "file:///nothing")
    config = RegisterConfig(model_name="whole")
    assert not carry_out(store, config, 1, FIRST), "it was compared with nothing"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    again = mlflow.register_model(f"models:/{model_id}", "whole")
    assert promote_version(store, "whole", "champion", int(again.version), "command", "me", "back")
    found = require_champion(store, "whole", "champion")
    assert found is not None and found.version == 2
    pull_model(store.uri, "whole@champion", tmp_path / "pulled")


def test_a_version_of_another_tool_is_described_and_not_pulled(
    store: TrackingStore, tmp_path: Path
) -> None:
    described = describe_version(store.uri, "clip/1")
    assert described.lineage is None
    said = " ".join(version_tree(described, None))
    assert "no lineage: the model's files are not at file:///nothing/1" in said
    with pytest.raises(InputError, match=r"files are not at file:///nothing/1.*another tool"):
        pull_model(store.uri, "clip/1", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_a_version_of_a_number_that_no_database_has_is_one_sentence(store: TrackingStore) -> None:
    assert carry_out(store, CONFIG, 1, FIRST)
    with pytest.raises(InputError, match="'clip' has no version 99999999999999999999; there are"):
        roll_back(store, "clip", "champion", 10**20 - 1, "Ada", "")


def test_two_aliases_of_a_model_know_nothing_of_each_other(store: TrackingStore) -> None:
    other = RegisterConfig(model_name="clip", alias="europe")
    assert carry_out(store, CONFIG, 1, FIRST)
    assert require_champion(store, "clip", "europe") is None
    assert carry_out(store, other, 2, FIRST)
    assert alias(store) == 1 and waits_for(store, other, 3, better_than(1)) is Waiting.STALE


def test_a_version_that_was_deleted_meanwhile_is_one_sentence(
    store: TrackingStore, tmp_path: Path
) -> None:
    store.client().delete_model_version("clip", "2")
    for ask in (
        lambda: carry_out(store, CONFIG, 2, FIRST),
        lambda: write_decision(store, "clip", 2, FIRST, tmp_path),
        lambda: decline_version(store, "clip", 2, "Ada", "no"),
    ):
        with pytest.raises(InputError, match=r"(?i)version.*2"):
            ask()


def test_a_yes_for_a_version_that_was_not_compared_with_the_champion_waits_for_a_new_decision(
    store: TrackingStore,
) -> None:
    assert carry_out(store, CONFIG, 1, FIRST)
    assert waits_for(store, CONFIG, 2, better_than(1)) is Waiting.DUE
    store.client().set_registered_model_alias("clip", "champion", "3")  # in MLflow's page
    assert waits_for(store, CONFIG, 2, better_than(1)) is Waiting.STALE
    store.client().set_registered_model_alias("clip", "champion", "1")
    assert waits_for(store, CONFIG, 2, better_than(1)) is Waiting.DUE


def test_the_champion_compared_with_itself_keeps_what_the_gate_said(
    store: TrackingStore, tmp_path: Path
) -> None:
    write_decision(store, "clip", 1, FIRST, tmp_path)
    again = better_than(1).model_copy(update={"outcome": GateOutcome.HOLD})
    write_decision(store, "clip", 1, again, tmp_path)
    assert standing_of(store, "clip", 1).gate == "promote"
