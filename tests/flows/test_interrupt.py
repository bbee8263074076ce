"""Ctrl-C while a flow's other processes are at work: they all end, and the work is kept."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.flows.command import TIMEOUT_S, Demo, processes_of, started

LONG_TRAINING = ("train.stage2.samples_seen=640000",)
ENDS_WITHIN_S = 40.0
"""The trainer's grace to save a checkpoint is 20 s; nobody should need it all."""


def ctrl_c(process: subprocess.Popen[str]) -> None:
    """What a terminal does: the signal to every process of the foreground group."""
    os.killpg(process.pid, signal.SIGINT)


def to_the_command_alone(process: subprocess.Popen[str]) -> None:
    """What an operator's `kill -INT` or a service manager does."""
    os.kill(process.pid, signal.SIGINT)


HOW = pytest.mark.parametrize("interrupt", [ctrl_c, to_the_command_alone])


@pytest.fixture
def root_with(finished: Demo, tmp_path: Path) -> Callable[..., Path]:
    """Makes a root in which these stages of the small demo are there already."""

    def copy(*stages: str) -> Path:
        for stage in stages:
            shutil.copytree(finished.root / stage, tmp_path / "runs" / stage)
        return tmp_path / "runs"

    return copy


@HOW
def test_an_interrupted_download_leaves_no_process_and_its_shards(
    finished: Demo, root_with: Callable[..., Path], interrupt: Callable[..., None]
) -> None:
    root = root_with("demo", "merge")
    with started(finished.arguments("run", "pipeline"), root) as process:
        wait_for(lambda: any(root.glob("download/*/shards/*")), process)
        assert len(processes_of(root)) >= 4, "command, Prefect's server, demo web, downloaders"
        interrupt(process)
        assert_ended_as_interrupted(process, root)
    assert not list(root.glob("download/*/manifest.json"))


@HOW
def test_an_interrupted_training_leaves_no_process_and_a_checkpoint(
    finished: Demo, root_with: Callable[..., Path], interrupt: Callable[..., None]
) -> None:
    root = root_with("demo", "merge", "download", "verify", "dataset", "initialise", "train")
    before = set(root.glob("train/*"))
    with started(finished.arguments("run", "pipeline", also=LONG_TRAINING), root) as process:
        wait_for(lambda: steps_done(root, before) >= 2, process)
        interrupt(process)
        assert_ended_as_interrupted(process, root)
    (stage2,) = set(root.glob("train/*")) - before
    assert not (stage2 / "manifest.json").exists()
    assert list(stage2.glob("checkpoints/step-*")), "the work since the start is lost"


def steps_done(root: Path, before: set[Path]) -> int:
    metrics = [folder / "metrics.jsonl" for folder in set(root.glob("train/*")) - before]
    return sum(file.read_bytes().count(b"\n") for file in metrics if file.exists())


def wait_for(is_time: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_time():
        assert process.poll() is None, f"ended too early: {process.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_ended_as_interrupted(process: subprocess.Popen[str], root: Path) -> None:
    interrupted = time.monotonic()
    _, errors = process.communicate(timeout=TIMEOUT_S)
    seconds = time.monotonic() - interrupted
    left = [process.cmdline() for process in processes_of(root) if process.is_running()]
    assert process.returncode == 130, errors
    assert [line for line in errors.splitlines() if line] == [
        "stopped: the same command goes on from here"
    ]
    assert left == []
    assert seconds < ENDS_WITHIN_S
    assert not any(
        "prefect.server" in " ".join(other.info["cmdline"] or ())
        and other.info["environ"] is not None
        and other.info["environ"].get("PREFECT_HOME", "").startswith(str(root))
        for other in psutil.process_iter(["cmdline", "environ"])
    )
