"""Embedding over ranks, here and by the launchers of trainings, with kills: the same bytes."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from evaclip_model.create import create_model
from evaclip_model.errors import InputError
from evaclip_model.ports import find_free_port
from evaclip_model.weights.load import save_model
from tasks.embed.config import FEATURES, EmbedConfig
from tasks.embed.embed import embed_samples
from tasks.process.launch import RankLaunch
from tasks.progress import report_nothing
from tests.tasks.embed.pictures import TINY, verify_pictures
from tests.tasks.process.fake_slurm import FakeSlurm

SHARDS = 5
CHECKOUT = Path(__file__).parents[3]
PROGRAM = """
import sys
from pathlib import Path
from tasks.embed.config import EmbedConfig
from tasks.embed.embed import embed_samples
from tasks.progress import report_nothing
model, verified, out = sys.argv[1:]
embed_samples(EmbedConfig(models=(model,)), "tiny", model, Path(verified), Path(out),
              report_nothing, ranks=2)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launched")
    save_model(create_model(TINY, seed=3), folder / "tiny")
    verified = verify_pictures(folder / "runs", shards=SHARDS, samples=80).folder
    return str(folder / "tiny"), verified


@pytest.fixture(scope="module")
def expected(data, tmp_path_factory):
    """Name -> bytes, of one rank."""
    return embed(data, tmp_path_factory.mktemp("one"))


def embed(data, out, **machine):
    model, verified = data
    report = machine.pop("report", report_nothing)
    embed_samples(EmbedConfig(models=(model,)), "tiny", model, verified, out, report, **machine)
    return {path.name: path.read_bytes() for path in (out / FEATURES).iterdir()}


def ranks_of(out):
    """Processes that encode into a folder."""
    words = ["-m", "tasks.embed.embed_shard", str(out / "job.json")]
    found = psutil.process_iter(["cmdline"])
    return [one for one in found if (one.info["cmdline"] or [])[1:] == words]


def test_three_ranks_give_the_bytes_of_one_and_say_how_far_they_are(data, expected, tmp_path):
    said = []
    report = lambda done, total, detail="": said.append((done, total, detail))  # noqa: E731
    assert embed(data, tmp_path, ranks=3, report=report) == expected
    assert not list(tmp_path.glob("job.json"))
    assert len(expected) == SHARDS
    for done, total, detail in said:
        assert done <= total == SHARDS * 80
        assert "images/s" in detail and detail.endswith("left")
        assert "MFU" not in detail, "nobody knows a CPU's peak"


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank", "all"])
def test_whoever_is_killed_in_a_shard_the_bytes_are_the_same(victim, data, expected, tmp_path):
    model, verified = data
    words = [sys.executable, "-c", PROGRAM, model, str(verified), str(tmp_path)]
    with subprocess.Popen(words, cwd=CHECKOUT) as process:
        deadline = time.monotonic() + 200
        while not (tmp_path / "state-0.json").exists():  # its model is open, its shard is not done
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        if victim == "all":
            process.kill()
        else:
            for one in ranks_of(tmp_path)[:1]:
                one.kill()
        process.wait(200)
    assert (process.returncode == 0) == (victim == "rank")
    psutil.wait_procs(ranks_of(tmp_path), timeout=30)
    before = {one.name: one.stat().st_mtime_ns for one in (tmp_path / FEATURES).glob("*.parquet")}
    assert embed(data, tmp_path, ranks=2) == expected
    for name, when in before.items():
        assert (tmp_path / FEATURES / name).stat().st_mtime_ns == when, "a shard was made twice"


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    started = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{started.bin}:{os.environ['PATH']}")
    monkeypatch.setattr("tasks.process.launch.CLUSTER_LOOK_S", 0.2)
    yield started
    started.close()


@pytest.mark.slow
def test_a_slurm_job_of_two_machines_that_is_preempted_gives_the_same_bytes(
    slurm, data, expected, tmp_path
):
    out = tmp_path / "out"
    out.mkdir()

    def preempt():
        while not (out / "state-0.json").exists():
            time.sleep(0.01)
        for tasks in slurm.spool.glob("*.tasks"):
            os.kill(int(tasks.read_text().split()[0]), signal.SIGKILL)

    thread = threading.Thread(target=preempt)
    thread.start()
    assert embed(data, out, launch=RankLaunch(launcher="slurm", ranks=2, nodes=2)) == expected
    thread.join()
    assert slurm.states == ["FAILED", "COMPLETED"]
    assert ranks_of(out) == []


@pytest.mark.slow
def test_torchruns_of_two_machines_share_the_shards_and_the_other_one_ends_when_it_is_over(
    data, expected, tmp_path
):
    meeting = f"127.0.0.1:{find_free_port()}"
    launch = RankLaunch(launcher="torchrun", ranks=1, nodes=2, rendezvous=meeting)
    script, other = tmp_path / "join.sh", []

    def join():
        while not script.exists():
            time.sleep(0.05)
        other.append(subprocess.run(["sh", script], cwd=CHECKOUT, timeout=250).returncode)

    thread = threading.Thread(target=join)
    thread.start()
    assert embed(data, tmp_path, launch=launch) == expected
    thread.join(60)
    assert other == [0]


def test_a_machine_without_a_gpu_that_is_asked_for_one_says_what_to_set(data, tmp_path):
    with pytest.raises(InputError, match=r"has no GPU .* set EVACLIP_EVALUATE_GPUS=0"):
        embed(data, tmp_path, device="cuda")
