"""Training as a job of a real Slurm: what it refuses, and a run that is preempted and requeued."""

import json
import os
import subprocess

import pytest

from evaclip_model.training.config import RESULT_FILE
from tasks.process.cluster import CLUSTERS, Program, job_script
from tasks.process.launch import WORKER
from tests.infra.slurm import Slurm
from tests.tasks.train.conftest import data  # noqa: F401
from tests.tasks.train.stage import STEPS, processes_of, train

CORES, GPUS = os.cpu_count(), 2
SLURM = {"launcher": "slurm", "ranks": 2}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    started = Slurm(tmp_path_factory.mktemp("slurm") / "slurm", CORES, GPUS)
    try:
        yield started
    finally:
        started.close()


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    for name, value in {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("tasks.process.launch.CLUSTER_LOOK_S", 0.5)


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_templates_job_is_one_that_slurm_takes_or_refuses_with_its_reason(slurm, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    asked = {}
    for ranks in (2, 99):
        script = out / f"{ranks}.sbatch"
        program = Program(WORKER, out / "train.json", out / "train.log", (out,))
        script.write_text(job_script(CLUSTERS["slurm"].template, program, ranks=ranks, nodes=1))
        words = ["sbatch", "--test-only", script]
        asked[ranks] = subprocess.run(words, capture_output=True, text=True)
    assert asked[2].returncode == 0 and "to start at" in asked[2].stderr
    assert asked[99].returncode != 0
    assert "Requested node configuration is not available" in asked[99].stderr


def test_a_preempted_and_requeued_training_ends_as_an_undisturbed_one(
    slurm,
    data,  # noqa: F811
    tmp_path,
):
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    for folder in (undisturbed, disturbed):
        folder.mkdir()
    expected = train(data, undisturbed, SLURM)
    urgent, seen = [], set()

    def report(done, total, detail=""):
        if done >= 20 and not urgent:
            # Asks for the whole machine in a partition that goes before.
            wrap = ["--wrap", "sleep 3", "--output=/dev/null"]
            job = ["sbatch", "--parsable", "--partition=urgent", "--exclusive", *wrap]
            urgent.append(slurm.run(*job))
        seen.update(slurm.run("squeue", "--noheader", "--partition=gpu", "--format=%i").split())

    made = train(data, disturbed, SLURM, report)

    assert len(seen) == 1, "one job, requeued, not a second one"
    (number,) = seen
    job = slurm.job(number)
    assert (job["Restarts"], job["JobState"]) == ("1", "COMPLETED")
    assert slurm.job(urgent[0])["JobState"] == "COMPLETED"
    assert [row["step"] for row in rows_of(disturbed)] == list(range(1, STEPS + 1))
    assert [r["loss"] for r in rows_of(disturbed)] == [r["loss"] for r in rows_of(undisturbed)]
    assert made.counts["final_loss"] == expected.counts["final_loss"]
    assert made.counts["samples_seen"] == expected.counts["samples_seen"]
    same = [(run / "model" / "model.safetensors").read_bytes() for run in (undisturbed, disturbed)]
    assert same[0] == same[1]
    assert json.loads((disturbed / RESULT_FILE).read_text())
    assert processes_of(disturbed) == []
    print(f"loss {made.counts['final_loss']} after {STEPS} steps, Restarts={job['Restarts']}")
