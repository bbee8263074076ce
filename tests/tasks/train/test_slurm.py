"""A training stage as a Slurm job: real ranks that find each other by Slurm's variables."""

import json
import os
import signal

import pytest

from tests.tasks.process.fake_slurm import FakeSlurm
from tests.tasks.train.stage import STEPS, processes_of, ranks_of, train

SLURM = {"launcher": "slurm", "ranks": 2}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    started = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{started.bin}:{os.environ['PATH']}")
    for name, value in {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("tasks.process.launch.CLUSTER_LOOK_S", 0.2)
    yield started
    started.close()


@pytest.mark.slow
def test_a_preempted_job_is_submitted_again_and_every_step_is_there_once(data, slurm, tmp_path):
    preempted = []

    def report(done, total, detail=""):
        if done >= 12 and not preempted:
            preempted.append(done)
            slurm.preempt()

    out = tmp_path / "run"
    out.mkdir()
    made = train(data, out, SLURM, report)

    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert made.counts["a.samples"] == made.counts["samples_seen"] == 12 * STEPS
    assert slurm.states == ["FAILED", "COMPLETED"]
    assert processes_of(out) == []


def test_an_interrupted_caller_leaves_no_job_but_a_checkpoint(data, slurm, tmp_path):
    out = tmp_path / "run"
    out.mkdir()

    def report(done, total, detail=""):
        if done >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(data, out, SLURM, report, samples_seen=12 * 100_000)
    assert processes_of(out) == []
    assert slurm.states == ["FAILED"]
    assert list((out / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_a_killed_submitter_does_not_double_the_ranks(data, slurm, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    killed = []

    def report(done, total, detail=""):
        assert len(ranks_of(out)) <= 2
        if done >= 12 and not killed:
            (submitter,) = [
                one
                for one in processes_of(out)
                if one.info["cmdline"][1:3] == ["-m", "tasks.process.cluster"]
            ]
            killed.append(submitter.pid)
            os.kill(submitter.pid, signal.SIGKILL)

    train(data, out, SLURM, report, samples_seen=12 * 300)
    assert killed
    assert slurm.states == ["COMPLETED"]
    assert processes_of(out) == []
