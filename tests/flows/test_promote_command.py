"""`promote` and `rollback` as a person types them, on a registry of three versions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flows.__main__ import main
from tasks.register.promotion import champion_of, history
from tasks.tracking import TrackingStore

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TrackingStore:
    """Version 1 is champion, the gate would promote 2, and it rejected 3."""
    root = tmp_path_factory.mktemp("registry")
    store = TrackingStore.at(f"sqlite:///{root}/mlflow.db", "e")
    client = store.client()
    client.create_registered_model("clip")
    for number, said in enumerate(("promote", "promote", "reject"), start=1):
        tags = {"evaclip.gate": said}
        client.create_model_version("clip", source=f"file:///nothing/{number}", tags=tags)
    client.set_registered_model_alias("clip", "champion", "1")
    return store


@pytest.fixture
def run(
    store: TrackingStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Runs a command; gives its status, output and errors."""
    monkeypatch.setenv("EVACLIP_TRACKING_URI", store.uri)

    def command(*words: str) -> tuple[int, str, str]:
        status = main(words)
        said = capsys.readouterr()
        return status, said.out, said.err

    return command


def champion(store: TrackingStore) -> int | None:
    found = champion_of(store, "clip", "champion")
    return found and found.version


def test_a_version_that_the_gate_would_promote_needs_no_force(
    run: Run, store: TrackingStore
) -> None:
    assert run("promote", "clip/2")[:2] == (0, "clip/2 is champion\n")
    assert champion(store) == 2
    assert run("promote", "clip/2")[:2] == (0, "clip/2 was champion\n")


def test_a_rejected_version_needs_force_and_a_reason(run: Run, store: TrackingStore) -> None:
    status, _, errors = run("promote", "clip/3")
    assert (status, errors) == (
        2,
        "error: the gate said REJECT of clip/3: add --force --reason TEXT to make it champion all "
        "the same\n",
    )
    status, _, errors = run("promote", "clip/3", "--force")
    assert (status, errors) == (
        *(2,),
        "error: --force needs --reason TEXT: it is kept with the version\n",
    )
    assert champion(store) == 2
    assert run("promote", "clip/3", "--force", "--reason", "the set was wrong")[0] == 0
    last = history(store, "clip", "champion")[-1]
    assert (last.version, last.how, last.why) == (3, "force", "the set was wrong")


def test_rollback_goes_back_one_version_and_prints_who_did_what(
    run: Run, store: TrackingStore
) -> None:
    status, output, _ = run("rollback", "clip", "--reason", "slow")
    first, *moves = output.splitlines()
    assert (status, first) == (0, "clip@champion: version 3 -> 2")
    assert [line.split("  ")[2].split()[1] for line in moves] == ["1", "2", "3", "2"]
    assert "version 3  force by " in moves[2] and moves[2].endswith(": the set was wrong")
    assert "version 2  rollback by " in moves[3] and moves[3].endswith(": slow")
    assert champion(store) == 2
    assert run("rollback", "clip", "--to", "3")[0] == 0
    assert champion(store) == 3


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["promote", "clip"], "'clip' is not a version: give NAME/VERSION, as evaclip/7"),
        (["promote", "clip/9"], "model 'clip' has no version 9; there are: 1, 2, 3"),
        (["rollback", "clap"], "no version of 'clap' is champion: there is nothing to roll back"),
        (["rollback", "clip", "--to", "9"], "model 'clip' has no version 9; there are: 1, 2, 3"),
    ],
)
def test_what_is_not_there_is_one_sentence(run: Run, words: list[str], sentence: str) -> None:
    status, _, errors = run(*words)
    assert status == 2
    assert errors.startswith(f"error: {sentence}")
    assert errors.count("\n") == 1


def test_where_nothing_was_registered_no_registry_is_made(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVACLIP_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for words in (("promote", "clip/1"), ("rollback", "clip")):
        status, _, errors = run(*words)
        assert status == 2 and "there is no registry at" in errors
    assert list(tmp_path.iterdir()) == []
