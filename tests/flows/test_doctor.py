"""What `python -m flows doctor` finds on machines that are not ready."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from flows.__main__ import main
from flows.config.profile import Profile, load_profile
from flows.planning import health_checks
from tasks.register.promotion import promote_version
from tasks.tracking import TrackingStore

PINNED = {"prefect": "3.8.8", "open-clip-torch": "3.3.0"}


def versions_of(**installed: str | None) -> dict[str, tuple[str, str]]:
    wanted = map(Requirement, ("prefect>=3.8.8,<3.9", "open_clip_torch>=2.32,<4"))
    found = health_checks.version_findings(wanted, PINNED, installed.get)
    return {one.what: (one.level, one.do) for one in found}


def test_versions_are_as_tested_within_bounds_or_wrong() -> None:
    assert versions_of(prefect="3.8.8", open_clip_torch="3.3.0+cpu") == {}
    assert versions_of(prefect="3.8.9", open_clip_torch="3.3.0") == {
        "prefect": ("warn", "tested was 3.8.8")
    }
    found = versions_of(prefect="3.9.1", open_clip_torch=None, dataclasses="0.6")
    assert found["prefect"][0] == found["open_clip_torch"][0] == found["dataclasses"][0] == "fail"
    assert found["prefect"][1].startswith("pip install 'prefect==3.8.8'")


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(profile: Profile) -> list[health_checks.Finding]:
        raise RuntimeError("http://me:secret@host is odd")

    monkeypatch.setattr(health_checks, "CHECKS", (broken, health_checks.check_tokenizer))
    first, second = health_checks.examine_machine(Profile(_env_file=None, root=tmp_path))
    assert (first.level, second.level) == ("fail", "ok")
    assert first.found == "RuntimeError: http://me:***@host is odd"


def test_what_a_finding_says_to_do_is_said_to_its_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    profile = Profile(_env_file=None, root=tmp_path / "a-long-name-of-a-folder" / ("x" * 200))
    store = TrackingStore.at(profile.mlflow_uri, "doctor")

    def of_another_schema(_: TrackingStore) -> str:
        raise store.explain_error(RuntimeError("Detected out-of-date database schema"))

    monkeypatch.setattr(TrackingStore, "try_out", of_another_schema)
    monkeypatch.setattr(health_checks, "CHECKS", (health_checks.check_tracking,))
    (found,) = health_checks.examine_machine(profile)
    assert found.found.endswith(f"run 'mlflow db upgrade {store.uri}'")


def test_a_champion_whose_files_were_moved_away_is_found_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    profile = Profile(_env_file=None, root=tmp_path / "runs")
    store = TrackingStore.at(profile.mlflow_uri, "doctor")
    for name in ("clip", "others"):
        store.client().create_registered_model(name)
        store.client().create_model_version(name, f"{tmp_path}/old/files")
    promote_version(store, "clip", "champion", 1, "gate", "gate", "first")
    monkeypatch.setattr(health_checks, "CHECKS", (health_checks.check_tracking,))
    tracking, lost = health_checks.examine_machine(profile)
    assert (tracking.level, lost.level, lost.what) == ("ok", "fail", "clip@champion")
    assert f"not at {tmp_path}/old/files" in lost.found and "ln -s NEW OLD" in lost.found
    (tmp_path / "old" / "files").mkdir(parents=True)
    (tmp_path / "old" / "files" / "MLmodel").write_text("flavors: {}")
    assert [one.level for one in health_checks.examine_machine(profile)] == ["ok", "ok"]


def test_packages_that_another_python_needs_are_not_missed(tmp_path: Path) -> None:
    found = health_checks.check_versions(Profile(_env_file=None, root=tmp_path))
    missing = [one.what for one in found if one.found == "not installed"]
    assert sys.version_info >= (3, 13) or "standard-imghdr" not in missing


def test_what_is_wrong_is_one_line_each_and_the_exit_code_is_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    with socket.create_server(("127.0.0.1", 0)) as other:
        settings = {
            "EVACLIP_ROOT": str(tmp_path / "file" / "runs"),
            "EVACLIP_TRACKING_URI": "http://127.0.0.1:1",
            "EVACLIP_LAUNCHER": "kubernetes",
            "EVACLIP_RANKS": "8",
            "EVACLIP_PREFECT_PORT": str(other.getsockname()[1]),
            "PREFECT_API_URL": "http://127.0.0.1:1/api",
            "PATH": str(tmp_path),
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        # The store is tried for longer than a test waits.
        checks = [
            check for check in health_checks.CHECKS if check is not health_checks.check_tracking
        ]
        monkeypatch.setattr(health_checks, "CHECKS", tuple(checks))
        assert main(["doctor", "--recipe", "eva02-clip-b-16"]) == 1
    lines = capsys.readouterr().out.splitlines()
    said = {line[6:].partition(": ")[0]: line for line in lines}
    for what in ("artifact root", "Prefect", "MLflow", "kubernetes", "inputs of merge", "disk"):
        assert said[what].startswith("fail") and " -> " in said[what], lines
    assert next(line for line in lines if "another program's" in line).startswith("warn")
    assert said["tokenizer"].startswith("ok") and "sha256 924691ac288e5440" in said["tokenizer"]
    assert "failed" in lines[-1]


def test_a_store_that_takes_runs_and_files_is_fine_as_often_as_one_looks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVACLIP_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (first,), (second,) = (
        health_checks.check_tracking(load_profile()),
        health_checks.check_tracking(load_profile()),
    )
    assert first == second and first.level == "ok"
    assert len(list((tmp_path / "mlflow-artifacts").rglob("written.txt"))) == 1


def test_the_vocabulary_is_compared_with_the_published_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = tmp_path / "vocabulary.gz"
    other.write_bytes(b"another one")
    monkeypatch.setattr(health_checks, "package_file", lambda name: other)
    (found,) = health_checks.check_tokenizer(Profile(_env_file=None, root=tmp_path))
    assert found.level == "fail" and "open_clip_torch" in found.do


@pytest.mark.parametrize(("launcher", "level"), [("auto", "ok"), ("slurm", "warn")])
def test_postgresql_is_asked_for_where_several_machines_share_the_root(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, launcher: str, level: str
) -> None:
    monkeypatch.setenv("EVACLIP_ROOT", str(tmp_path))
    monkeypatch.setenv("EVACLIP_LAUNCHER", launcher)
    monkeypatch.setenv("EVACLIP_RANKS", "8")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    *_, found = health_checks.check_tracking(load_profile())
    assert found.level == level
    assert ("PostgreSQL" in found.do) is (level == "warn")
