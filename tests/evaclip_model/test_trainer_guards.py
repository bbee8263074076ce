"""Runs that meet bad steps: left out and named, gone back from, resumed all the same."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from evaclip_model.reading.samples import Shard, ShardManifest
from evaclip_model.training.worker import DIVERGED
from tests.evaclip_model.conftest import write_shard
from tests.evaclip_model.trainer_runs import finish, job_of, start, wait_for

ODD = "00009"
POISONED = Path(__file__).with_name("poisoned_worker.py")
ON_CPU = Path(__file__).with_name("fp16_on_cpu.py")


@pytest.fixture(scope="module")
def one_bad_sample(tiny_data, tmp_path_factory):
    """One shard of 48 samples, one of which the poisoned worker's model has no numbers for."""
    folder = tmp_path_factory.mktemp("bad")
    names = [f"{number:06b}" for number in range(47)]
    write_shard(folder / "a0.tar", "a", [*names[:20], ODD, *names[20:]], np.random.default_rng(1))
    described = {"path": "a0.tar", "source": "a", "samples": 48, "sha256": "0" * 64}
    described["bytes"] = (folder / "a0.tar").stat().st_size
    ShardManifest(shards=(Shard(**described),)).write(folder / "shards.json")
    (folder / "start").symlink_to(tiny_data / "start")
    return folder


def run_poisoned(ranks, job):
    return ranks.start(2, job.parent, POISONED, job)


ONE_SOURCE = {"source_weights": {}, "samples_seen": 8 * 24}


def test_a_sample_without_numbers_is_named_and_its_step_left_out(one_bad_sample, ranks, tmp_path):
    job = job_of(one_bad_sample, tmp_path / "run", **ONE_SOURCE)
    rows = finish(ranks, run_poisoned(ranks, job), job)

    left_out = [row["step"] for row in rows if not row["taken"]]
    assert len(left_out) == 4  # every sample is shown once in two steps
    assert rows[-1]["skipped_steps"] == 4
    assert all(("loss" in row) == bool(row["taken"]) for row in rows)
    dumps = sorted(job.parent.glob("nonfinite-*.json"))
    assert [int(path.stem.rpartition("-")[2]) for path in dumps] == left_out
    (rank,) = json.loads(dumps[0].read_text())["ranks"]
    (bad,) = [sample for sample in rank["samples"] if not sample["finite"]]
    assert (bad["shard"], bad["key"]) == ("a0.tar", ODD)
    log = (job.parent / "rank-0.log").read_text()
    assert f"rank {rank['rank']}, sample {ODD} of a0.tar" in log
    weights = load_file(job.parent / "model/model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_too_many_steps_without_numbers_end_the_run_with_a_sentence(
    one_bad_sample, ranks, tmp_path
):
    job = job_of(one_bad_sample, tmp_path / "run", **ONE_SOURCE, guards={"max_nonfinite_steps": 0})
    assert ranks.wait(run_poisoned(ranks, job)) == [DIVERGED] * 2
    error = (job.parent / "error.txt").read_text()
    assert f"sample {ODD} of a0.tar" in error
    assert error.count("\n") == 1


GUARDS = {"spike_action": "rollback", "spike_window_steps": 2, "spike_deviations": 0.6}
GUARDS |= {"max_rollbacks": 40}
NERVOUS = {"lr_vision": 3e-3, "lr_text": 3e-3, "schedule": "constant", "guards": GUARDS}
"""Ordinary noise is a spike."""


def test_a_run_that_goes_back_resumes_like_one_that_was_not_killed(tiny_data, ranks, tmp_path):
    settings = {**NERVOUS, "samples_seen": 24 * 24}
    whole = job_of(tiny_data, tmp_path / "whole", **settings)
    rows = finish(ranks, start(ranks, 2, whole), whole)
    result = json.loads((whole.parent / "result.json").read_text())
    assert result["rollbacks"] >= 1
    assert [row["step"] for row in rows] == list(range(1, 25))
    shown = sum(result["source_samples"].values())
    assert shown > result["samples_seen"]  # the data ran ahead of the steps

    killed = job_of(tiny_data, tmp_path / "killed", **settings)
    pids = start(ranks, 2, killed)
    wait_for(killed.parent / "metrics.jsonl", 13)
    os.kill(pids[0], signal.SIGKILL)
    ranks.wait(pids)
    again = finish(ranks, start(ranks, 2, killed), killed)

    assert [row["loss"] for row in again] == [row["loss"] for row in rows]
    resumed = json.loads((killed.parent / "result.json").read_text())
    assert resumed["source_samples"] == result["source_samples"]
    assert resumed["rollbacks"] == result["rollbacks"]


def test_spikes_without_end_end_the_run(tiny_data, ranks, tmp_path):
    job = job_of(
        tiny_data, tmp_path / "run", **{**NERVOUS, "guards": GUARDS | {"max_rollbacks": 0}}
    )
    assert ranks.wait(start(ranks, 2, job)) == [DIVERGED] * 2
    assert "spike at step" in (job.parent / "error.txt").read_text()


def test_a_spike_may_be_left_out_instead(tiny_data, ranks, tmp_path):
    job = job_of(
        tiny_data, tmp_path / "run", **{**NERVOUS, "guards": GUARDS | {"spike_action": "skip"}}
    )
    rows = finish(ranks, start(ranks, 2, job), job)
    spikes = [row for row in rows if row["spike"]]
    assert spikes
    assert not any(row["taken"] for row in spikes)
    assert rows[-1]["skipped_steps"] == len(spikes)


def test_fp16_overflows_are_counted_lower_the_loss_scale_and_end_no_run(tiny_data, ranks, tmp_path):
    job = job_of(tiny_data, tmp_path / "run", precision="fp16", samples_seen=8 * 24)
    pids = ranks.start(2, job.parent, ON_CPU, "evaclip_model.training.worker", job)
    rows = finish(ranks, pids, job)
    overflowed = [row for row in rows if not row["taken"]]
    assert overflowed
    assert not any("grad_norm" in row for row in overflowed)
    assert all("loss" in row for row in rows)
    assert rows[-1]["skipped_steps"] == len(overflowed)
    assert rows[-1]["loss_scale"] < rows[0]["loss_scale"] == 2**16
    assert not list(job.parent.glob("nonfinite-*.json"))
