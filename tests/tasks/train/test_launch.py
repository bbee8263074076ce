"""How ranks are started: the command line and the environment."""

import sys
from pathlib import Path

import pytest

from tasks.train.launch import (
    command,
    count_gpus,
    default_ranks,
    default_read_workers,
    environment,
)


def test_one_rank_is_a_plain_process_and_more_are_torchruns():
    job = Path("/somewhere/train.json")
    assert command(job, 1) == [sys.executable, "-m", "evaclip_model.training.worker", str(job)]
    two = command(job, 2)
    assert two[1:3] == ["-m", "torch.distributed.run"]
    assert "--nproc-per-node=2" in two
    assert "--rdzv-endpoint=127.0.0.1:0" in two
    assert two[-3:] == ["-m", "evaclip_model.training.worker", str(job)]


def test_cores_are_shared_out_and_gloo_stays_on_loopback():
    two = environment({"HOME": "/h", "OMP_NUM_THREADS": "7"}, ranks=2, cores=5, use_gpus=False)
    assert two["OMP_NUM_THREADS"] == "2"
    assert two["GLOO_SOCKET_IFNAME"] == "lo"
    assert two["HOME"] == "/h"
    many = environment({}, ranks=4, cores=2, use_gpus=True)
    assert many["OMP_NUM_THREADS"] == "1"
    assert "GLOO_SOCKET_IFNAME" not in many


@pytest.mark.parametrize(
    ("cores", "gpus", "ranks"), [(1, 0, 1), (2, 0, 2), (64, 0, 2), (4, 1, 1), (4, 8, 8)]
)
def test_ranks_nobody_chose_follow_the_machine(cores, gpus, ranks):
    assert default_ranks(cores, gpus) == ranks


def test_gpus_are_counted_as_they_are_visible(tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert count_gpus(None, tmp_path) == 2
    assert count_gpus("0", tmp_path) == 1
    assert count_gpus("", tmp_path) == 0
    assert count_gpus("-1", tmp_path) == 0


@pytest.mark.parametrize(
    ("cores", "ranks", "gpus", "workers"),
    [(64, 8, 8, 7), (4, 4, 4, 0), (2, 4, 4, 0), (64, 2, 0, 0)],
)
def test_reading_processes_get_the_cores_that_gpus_leave(cores, ranks, gpus, workers):
    assert default_read_workers(cores, ranks, gpus) == workers
