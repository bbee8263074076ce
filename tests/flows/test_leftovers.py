"""`python -m flows prune`: what may go, what stays, and what a kill in the middle leaves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from evaclip_model.files import lock_file
from flows.__main__ import main
from flows.audit.leftovers import find_leftovers, remove_leftovers
from flows.config.profile import Profile
from tasks.artifacts.artifact import (
    MANIFEST,
    PRUNED,
    ROOT_LOCK,
    Address,
    Artifact,
    Made,
    Role,
    Stage,
    produce_artifact,
    read_artifact,
    read_artifacts,
)
from tasks.progress import report_nothing
from tasks.register.config import STAGE as REGISTER
from tasks.register.promotion import DIGEST_TAG, carry_out, promote_version, write_decision
from tasks.tracking import TrackingStore
from tests.flows.test_attempts import FIRST, NAME, RECIPE, find_news, hash_marks

VERSIONS = 4
"""1 and 2 were champion, 2 is; 3 never was; 4 is the newest."""


def make_file(root: Path, kind: str, parents: dict[str, str], config: str = "") -> Artifact:
    def make(out: Path) -> Made:
        (out / "content").write_bytes(b"x" * 1000)
        return Made({"selected": 1, "samples": 1}, (out / "content",))

    address = Address(root, Stage(kind, 1), {"name": config}, parents)
    return produce_artifact(address, make)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four attempts on one dataset version, and what else lies about."""
    root = tmp_path_factory.mktemp("made") / "runs"
    store = TrackingStore.at(f"sqlite:///{root}/mlflow.db", "e")
    merge = make_file(root, "merge", {})
    download = make_file(root, "download", {Role.MERGE: merge.digest})
    verify = make_file(root, "verify", {Role.DOWNLOAD: download.digest})
    dataset = make_file(root, "dataset", {Role.DATA: verify.digest})
    client = store.client()
    client.create_registered_model(NAME)
    for version in range(1, VERSIONS + 1):
        train = make_file(root, "train", {Role.DATASET: dataset.digest}, f"attempt {version}")
        tags = {DIGEST_TAG: train.digest}
        client.create_model_version(NAME, "file:///nothing", tags=tags)
        made_from = {Role.TRAINED: train.digest, Role.TRACKING: hash_marks([store.uri])}

        def register(out: Path, number: int = version) -> Made:
            return Made({"version": number}, write_decision(store, NAME, number, FIRST, out))

        produce_artifact(Address.of(root, REGISTER, RECIPE.registry, made_from), register)
    assert carry_out(store, RECIPE.registry, 1, FIRST)
    assert promote_version(store, NAME, RECIPE.registry.alias, 2, "command", "me", "")
    other = make_file(root, "merge", {}, "of a recipe that was given up")
    unnamed = make_file(root, "download", {Role.MERGE: other.digest})
    make_file(root, "verify", {Role.DOWNLOAD: unnamed.digest})
    (root / "train" / "0123456789abcdef").mkdir()
    (root / "cache/evaluate/features").mkdir(parents=True)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "runs")


def profile_of(root: Path) -> Profile:
    return Profile(_env_file=None, root=root)


def test_what_nothing_needs_goes_and_what_lineage_rollback_and_retraining_need_stays(
    root: Path,
) -> None:
    before = find_news(root)
    found = find_leftovers(profile_of(root), days=0)
    assert sorted((one.path.parent.name, one.why) for one in found) == [
        ("download", "no dataset version is made of it"),
        ("evaluate", "can be made again"),
        ("train", "evaclip-demo/3 was never champion and is not the newest"),
        ("train", "half-made"),
        ("verify", "no dataset version is made of it"),
    ]
    remove_leftovers(root, found, report_nothing)
    assert find_leftovers(profile_of(root), days=0) == []
    trained = [one for one in read_artifacts(root) if one.kind == "train"]
    assert len(trained) == VERSIONS
    held = [(one.folder / "content").exists() for one in trained]
    assert held.count(False) == 1 and held.index(False) == 2
    assert sorted(path.name for path in trained[2].folder.iterdir()) == [PRUNED]
    assert not (root / ".removed").exists() or list((root / ".removed").iterdir()) == []
    after = find_news(root)
    assert after.is_nothing and after.used == before.used and after.start == before.start


def test_what_is_new_enough_and_what_waits_for_the_next_retraining_stays(root: Path) -> None:
    assert find_leftovers(profile_of(root), days=1) == []
    given = make_file(root, "merge", {Role.GIVEN: "0" * 16})
    waiting = make_file(root, "download", {Role.MERGE: given.digest})
    (root / "download" / "fedcba9876543210").mkdir()
    paths = {one.path for one in find_leftovers(profile_of(root), days=0)}
    assert waiting.folder not in paths and root / "download" / "fedcba9876543210" not in paths


@pytest.mark.parametrize("what", ["renamed", "deleted"])
def test_no_training_goes_while_a_colleague_has_renamed_the_model_or_deleted_its_champion(
    root: Path, what: str
) -> None:
    client = TrackingStore.at(f"sqlite:///{root}/mlflow.db", "e").client()
    if what == "renamed":
        client.rename_registered_model(NAME, "bobs")
    else:
        client.delete_model_version(NAME, "2")
    found = [one for one in find_leftovers(profile_of(root), days=0) if one.why != "half-made"]
    assert {one.path.parent.name for one in found} == {"download", "evaluate", "verify"}


def test_a_pruned_training_is_made_again_when_it_is_asked_for(root: Path) -> None:
    remove_leftovers(root, find_leftovers(profile_of(root), days=0), report_nothing)
    (pruned,) = root.glob(f"train/*/{PRUNED}")
    artifact = read_artifact(pruned.parent)
    again = make_file(root, "train", dict(artifact.parents), artifact.config["name"])
    assert again.folder == pruned.parent and not pruned.exists()
    assert (again.folder / "content").exists() and (again.folder / MANIFEST).exists()


class Killed(BaseException):
    """As a kill -9 of this process."""


def test_a_kill_leaves_every_artifact_whole_or_gone(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for moment in (0, 1, 2, 4, 7, 9):
        root = shutil.copytree(made, tmp_path / str(moment) / "runs")
        left = moment

        def killed_at(real: Callable[..., object]) -> Callable[..., object]:
            def act(*arguments: object) -> object:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return real(*arguments)

            return act

        found = find_leftovers(profile_of(root), days=0)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", killed_at(Path.rename))
            patch.setattr(shutil, "rmtree", killed_at(shutil.rmtree))
            with pytest.raises(Killed):
                remove_leftovers(root, found, report_nothing)
        for manifest in root.glob(f"*/*/{MANIFEST}"):
            for name in read_artifact(manifest.parent).files:
                assert (manifest.parent / name).exists()
        remove_leftovers(root, find_leftovers(profile_of(root), days=0), report_nothing)
        assert find_leftovers(profile_of(root), days=0) == []
        assert find_news(root).is_nothing


def test_the_command_only_says_until_it_is_told_and_never_beside_a_flow(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root.parent)
    monkeypatch.setenv("EVACLIP_ROOT", str(root))
    monkeypatch.setenv("EVACLIP_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
    assert main(["prune", "--days", "0"]) == 0
    said = capsys.readouterr().out
    assert "but for its manifest: evaclip-demo/3 was never champion" in said
    assert said.splitlines()[-1].endswith("remove it with --yes")
    assert len(find_leftovers(profile_of(root), days=0)) == 5
    running = lock_file(root / ROOT_LOCK, shared=True)
    assert running is not None
    assert main(["prune", "--days", "0", "--yes"]) == 2
    assert "a flow is running under" in capsys.readouterr().err
    running.close()
    assert main(["prune", "--days", "0", "--yes"]) == 0
    assert find_leftovers(profile_of(root), days=0) == []


def test_features_stay_as_long_as_the_samples_that_they_are_of(root: Path) -> None:
    parents = {one.digest: one.parents for one in read_artifacts(root) if one.kind == "verify"}
    datasets = [one for one in read_artifacts(root) if one.kind == "dataset"]
    used = {one.parents[Role.DATA] for one in datasets}
    for digest in parents:
        make_file(root, "embed", {Role.DATA: digest, Role.SUBJECT: "a model"})
    found = find_leftovers(profile_of(root), days=0)
    gone = [read_artifact(one.path) for one in found if one.path.parent.name == "embed"]
    assert [one.parents[Role.DATA] in used for one in gone] == [False]
    places = [one.path.parent.name for one in found]
    assert places.index("embed") < places.index("verify")
