"""Two cells of the resume matrix; `make test-train-faults` plays all of them, with more kills."""

import json
import os
import random
import signal

import numpy as np
import pytest
import torch

from evaclip_model.reading.teacher_features import stream_file
from tests.evaclip_model.trainer_runs import finish, job_of, start, wait_for
from tests.faults.training import TOLERANCE, Training, differences

STEPS = 12


@pytest.fixture(scope="module")
def uninterrupted(ranks, tiny_data, tmp_path_factory):
    run = Training(ranks, tiny_data, tmp_path_factory.mktemp("whole"), "bf16", STEPS)
    run.to_the_end(2)
    return run


@pytest.mark.parametrize("after", [2, 1])
def test_killed_in_the_middle_of_a_save_it_goes_on_as_if_it_had_not_been(
    ranks, tiny_data, tmp_path, uninterrupted, after
):
    run = Training(ranks, tiny_data, tmp_path, "bf16", STEPS)
    assert run.killed(2, random.Random(after), in_a_save=True)
    assert not run.kills.wrong
    run.to_the_end(after)
    of_loss, of_weights = differences(run, uninterrupted)
    if after == 2:
        assert of_loss == of_weights == 0
    else:
        assert 0 < of_loss < TOLERANCE["bf16"]


def test_so_it_does_with_the_sigmoid_loss_a_teacher_and_captions_in_part(
    ranks, tiny_data, tmp_path
):
    teachers = tmp_path / "teachers"
    teachers.mkdir()
    features = torch.nn.functional.normalize(torch.randn(STEPS * 24, 2, 8), dim=-1)
    np.save(stream_file(teachers, 0), features.numpy().astype(np.float16))
    settings = {
        "objective": "sigmoid",
        "teacher": {"models": ["any"], "weight": 0.3},
        "text_tokens": 5,
        "text_tokens_kept": "random",
        "job": {"teachers": [str(teachers)]},
    }
    whole, run = (
        Training(ranks, tiny_data, tmp_path / name, "bf16", STEPS, **settings)
        for name in ("whole", "run")
    )
    whole.to_the_end(2)
    assert run.killed(2, random.Random(1), in_a_save=True)
    run.to_the_end(2)
    assert differences(run, whole) == (0, 0)
    assert all(row["text_tokens"] <= 5 for row in rows_of(run.job))
    # The master's: what the ranks compute with is the nearest number in bf16, sixteenths at -10.
    assert -10.5 < run.weights()["logit_bias"].item() != -10


def test_from_checkpoints_at_a_url_a_machine_without_anything_else_goes_on(
    ranks, tiny_data, tmp_path
):
    store = tmp_path / "store"
    job = job_of(
        tiny_data,
        tmp_path / "run",
        engine="torch",
        samples_seen=12 * 24,
        job={"checkpoints": f"file://{store}"},
    )
    pids = start(ranks, 1, job)
    wait_for(job.parent / "metrics.jsonl", 10)
    os.kill(pids[0], signal.SIGKILL)
    ranks.wait(pids)
    before = [row["time"] for row in rows_of(job)]
    (job.parent / "metrics.jsonl").unlink()
    rows = finish(ranks, start(ranks, 1, job), job)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["time"] for row in rows][:4] == before[:4]
    assert not (job.parent / "checkpoints").exists()
    kept = ["metrics.jsonl", "step-00000004", "step-00000008"]
    assert sorted(path.name for path in store.iterdir()) == kept


def rows_of(job):
    lines = (job.parent / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
