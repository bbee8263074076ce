"""Jobs of a cluster: submitted, followed, found again, cancelled; with a Slurm of one machine."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from evaclip_model import InputError
from tasks.process import cluster
from tasks.process.cluster import CANCELLED, CLUSTERS, FAILED, OVER
from tests.tasks.process.fake_slurm import FakeSlurm

CHECKOUT = Path(__file__).parents[3]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    started = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{started.bin}:{os.environ['PATH']}")
    yield started
    started.close()


def write_job(folder, command):
    """A job of one task that runs `command` in the shell."""
    script = folder / "job.sbatch"
    head = [f"--job-name={folder.name}", "--nodes=1", "--ntasks-per-node=1", "--output=/dev/null"]
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in head)]
    script.write_text("\n".join([*lines, f"exec srun bash -c '{command}'", ""]))
    return script


def submit(script):
    words = ["-m", "tasks.process.cluster", "slurm", str(script), script.parent.name, "0.05"]
    return subprocess.Popen([sys.executable, *words], cwd=CHECKOUT, stderr=subprocess.PIPE)


def eventually(condition, within_s=10.0):
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_it_stays_until_the_job_is_over_however_that_ended(slurm, tmp_path):
    assert submit(write_job(tmp_path, "sleep 0.3")).wait(20) == OVER
    assert submit(write_job(tmp_path, "exit 76")).wait(20) == OVER
    assert slurm.states == ["COMPLETED", "FAILED"]


def test_sigterm_has_the_job_saved_and_ended_first(slurm, tmp_path):
    saved, ready = tmp_path / "saved", tmp_path / "ready"
    save = f'trap "sleep 0.5; touch {saved}; exit 75" TERM; touch {ready}; sleep 60 & wait'
    process = submit(write_job(tmp_path, save))
    eventually(ready.exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == CANCELLED
    assert saved.exists()
    assert slurm.states == ["FAILED"]


def test_a_job_whose_submitter_was_killed_is_gone_on_with(slurm, tmp_path):
    script = write_job(tmp_path, f"until [ -e {tmp_path}/go ]; do sleep 0.05; done")
    killed = submit(script)
    eventually(lambda: slurm.states == ["RUNNING"])
    killed.kill()
    killed.wait()
    time.sleep(1)  # a question that the killed one was asking
    (slurm.spool / "asked").unlink(missing_ok=True)
    again = submit(script)
    eventually((slurm.spool / "asked").exists)
    (tmp_path / "go").touch()
    assert again.wait(20) == OVER
    assert slurm.states == ["COMPLETED"], "one job, not two"


def test_what_the_cluster_says_against_a_job_is_in_the_log(slurm, tmp_path):
    (slurm.bin / "sbatch").write_text("#!/bin/sh\necho 'invalid partition: gpus' >&2\nexit 1\n")
    process = submit(write_job(tmp_path, "true"))
    assert process.wait(20) == FAILED
    assert b"invalid partition: gpus" in process.stderr.read()


def test_a_job_that_waits_says_why_once_and_is_given_up_when_that_does_not_mend_itself(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(cluster, "MAX_HOPELESS_S", 0.5)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    gone = tmp_path / "gone"
    reason = 'case "$*" in *%r*) echo PENDING job requeued held;; *) echo PENDING;; esac'
    held = f"[ -e {gone} ] && exit; {reason}"
    for name, line in {"squeue": held, "scancel": f"touch {gone}"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    job = cluster._Job(CLUSTERS["slurm"], "job.sbatch", "evaclip-x")
    with pytest.raises(InputError, match=r"evaclip-x waited for .* held\): mend that"):
        job.follow_job(threading.Event(), 0.05)
    assert capsys.readouterr().out == "job evaclip-x: PENDING job requeued held\n"
    assert gone.exists(), "the job is cancelled"
