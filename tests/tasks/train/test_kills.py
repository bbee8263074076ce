"""kill -9 of what starts ranks: nothing is left running, and the stage is whole in the end."""

import json
import os
import signal
import socket
import subprocess
import threading
import time

import pytest

from tests.tasks.train.stage import STEPS, processes_of, ranks_of, train

pytestmark = pytest.mark.slow


def hostfile(folder):
    path = folder / "hosts"
    path.write_text("localhost slots=2\n")
    return path


LAUNCHES = {
    "torch.distributed.run": lambda folder: {"launcher": "torchrun", "ranks": 2},
    "deepspeed.launcher.runner": lambda folder: deepspeed(folder),
    "deepspeed.launcher.launch": lambda folder: deepspeed(folder),
    "supervise.py": lambda folder: {"launcher": "torchrun", "ranks": 2},
}


def deepspeed(folder):
    return {"launcher": "deepspeed", "hostfile": hostfile(folder)}


@pytest.mark.parametrize("victim", LAUNCHES)
def test_the_killed_one_takes_all_with_it_and_the_next_start_goes_on(data, tmp_path, victim):
    out = tmp_path / "run"
    out.mkdir()
    killed = []

    def report(done, total, detail=""):
        assert len(ranks_of(out)) <= 2
        if done >= 12 and not killed:
            mine = [one for one in processes_of(out) if is_program(one, victim)]
            killed.extend(one.pid for one in mine)
            os.kill(mine[0].pid, signal.SIGKILL)

    made = train(data, out, LAUNCHES[victim](tmp_path), report)

    assert len(killed) == 1
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert made.counts["a.samples"] == made.counts["samples_seen"] == 12 * STEPS
    assert processes_of(out) == []


def test_a_whole_deepspeed_launch_stops_with_a_checkpoint(data, tmp_path):
    out = tmp_path / "run"
    out.mkdir()

    def report(done, total, detail=""):
        if done >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(data, out, deepspeed(tmp_path), report, samples_seen=12 * 100_000)
    assert processes_of(out) == []
    assert list((out / "checkpoints").glob("step-*"))


def test_a_second_machine_joins_and_comes_back_when_one_rank_is_killed(data, tmp_path, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = f"127.0.0.1:{probe.getsockname()[1]}"
    for name, value in {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "run"
    out.mkdir()
    joined, killed = [], []

    def report(done, total, detail=""):
        if done >= 12 and not killed:
            killed.extend(one.pid for one in ranks_of(out))
            os.kill(killed[-1], signal.SIGKILL)

    def join():
        while not (out / "join.sh").exists():
            time.sleep(0.1)
        with (tmp_path / "join.log").open("wb") as log:
            joined.append(subprocess.run(["sh", str(out / "join.sh")], stdout=log, stderr=log))

    other = threading.Thread(target=join)
    other.start()
    two = {"launcher": "torchrun", "nodes": 2, "ranks": 1, "rendezvous": meeting}
    made = train(data, out, two, report)
    other.join()

    assert len(killed) == 2
    assert made.counts["a.samples"] == made.counts["samples_seen"] == 12 * STEPS
    assert joined[0].returncode == 0
    assert processes_of(out) == []


def is_program(process, name):
    """Whether a process runs that module or script, and not what it starts with it."""
    words = process.info["cmdline"]
    return any(word == name or word.endswith(f"/{name}") for word in words[1:4])
