"""Training end to end on a few real shards: any number of ranks, killed and resumed."""

import json
import os
import random
import signal

import pytest
import torch
from safetensors.torch import load_file

from evaclip_model.training.config import TrainConfig
from evaclip_model.training.training_step import vary_caption
from evaclip_model.training.worker import DATA_ERROR, RESUMABLE
from tests.evaclip_model.trainer_runs import finish, job_of, lines, start, wait_for


@pytest.fixture(scope="module")
def two_ranks(tiny_data, ranks, tmp_path_factory):
    """An uninterrupted run of two ranks: its folder and its metrics."""
    job = job_of(tiny_data, tmp_path_factory.mktemp("two"))
    return job.parent, finish(ranks, start(ranks, 2, job), job)


def test_two_ranks_lose_what_one_loses(tiny_data, ranks, two_ranks, tmp_path):
    job = job_of(tiny_data, tmp_path / "one", engine="torch")
    alone = finish(ranks, start(ranks, 1, job), job)
    folder, together = two_ranks
    assert [row["step"] for row in together] == list(range(1, 21))
    for ours, theirs in zip(together, alone, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert together[-1]["loss"] < together[0]["loss"]
    result = json.loads((folder / "result.json").read_text())
    assert result["source_samples"] == {"a": 384, "b": 96}


@pytest.mark.parametrize("same_caption", ["negative", "ignore"])
def test_so_they_do_with_the_sigmoid_loss_and_in_parts(tiny_data, ranks, tmp_path, same_caption):
    settings = {
        "objective": "sigmoid",
        "same_caption": same_caption,
        "caption_separator": " ",  # so that many show the same
        "lr_vision": 2e-4,
        "lr_text": 2e-4,
    }
    job = job_of(tiny_data, tmp_path / "one", engine="torch", **settings)
    alone = finish(ranks, start(ranks, 1, job), job)
    job = job_of(tiny_data, tmp_path / "two", job={"micro_batch": 4}, **settings)
    together = finish(ranks, start(ranks, 2, job), job)
    assert together[0]["loss"] == pytest.approx(alone[0]["loss"], rel=1e-6)
    for name, allowed in {"loss": 1e-4, "grad_norm": 1e-3, "logit_bias": 1e-6}.items():
        theirs = [row[name] for row in alone]
        assert [row[name] for row in together] == pytest.approx(theirs, rel=allowed)
    assert together[-1]["loss"] < together[0]["loss"]
    assert abs(together[-1]["logit_bias"] + 10) > 1e-3
    ours, theirs = (
        load_file(tmp_path / at / "model" / "model.safetensors") for at in ("two", "one")
    )
    torch.testing.assert_close(ours["logit_bias"], theirs["logit_bias"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_whose_rank_is_killed_ends_like_one_that_is_not(
    tiny_data, ranks, two_ranks, tmp_path, seed
):
    folder, expected = two_ranks
    job = job_of(tiny_data, tmp_path / "killed")
    chance = random.Random(seed)
    pids = start(ranks, 2, job)
    wait_for(job.parent / "metrics.jsonl", chance.randrange(1, 16))
    os.kill(pids[chance.randrange(2)], signal.SIGKILL)
    codes = ranks.wait(pids)
    assert -signal.SIGKILL in codes
    assert 0 not in codes
    assert lines(job.parent / "metrics.jsonl") < 20

    rows = finish(ranks, start(ranks, 2, job), job)

    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]
    ours, theirs = (load_file(at / "model/model.safetensors") for at in (job.parent, folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_asked_to_stop_saves_and_another_number_of_ranks_goes_on(
    tiny_data, ranks, two_ranks, tmp_path
):
    _, expected = two_ranks
    job = job_of(tiny_data, tmp_path / "stopped", checkpoint_every_steps=1000)
    pids = start(ranks, 2, job)
    wait_for(job.parent / "metrics.jsonl", 3)
    os.kill(pids[1], signal.SIGTERM)
    done = len(finish(ranks, pids, job, expected=RESUMABLE))
    assert (job.parent / "resumable").exists()
    assert [path.name for path in (job.parent / "checkpoints").iterdir()] == [f"step-{done:08d}"]

    rows = finish(ranks, start(ranks, 5, job), job)  # one of which has a pair less

    for ours, theirs in zip(rows, expected, strict=True):
        for name in ("loss", "image_to_text_accuracy", "text_tokens"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_a_users_mistake_is_one_sentence(tiny_data, ranks, tmp_path):
    job = job_of(tiny_data, tmp_path / "wrong", engine="torch", source_weights={"c": 1.0})
    assert ranks.wait(start(ranks, 1, job)) == [DATA_ERROR]
    assert "'c'" in (job.parent / "error.txt").read_text()


def test_captions_keep_their_title_and_vary_by_position_alone():
    config = TrainConfig(
        name="x",
        image_px=16,
        samples_seen=24,
        global_batch=24,
        lanes=6,
        caption_separator=", ",
        caption_templates=("{}", "an emoji of {}"),
    )
    caption = "red apple, fruit, food"
    seen = {vary_caption(caption, config, position) for position in range(200)}
    parts = ("red apple", "red apple, fruit", caption)
    assert seen == {
        template.format(part) for part in parts for template in ("{}", "an emoji of {}")
    }
    assert [vary_caption(caption, config, p) for p in range(9)] == [
        vary_caption(caption, config, p) for p in range(9)
    ]
    whole = config.model_copy(update={"caption_separator": None, "caption_templates": ("{}",)})
    assert vary_caption(caption, whole, 3) == caption


def test_the_torch_engine_refuses_a_second_rank(tiny_data, ranks, tmp_path):
    job = job_of(tiny_data, tmp_path / "two", engine="torch")
    assert ranks.wait(start(ranks, 2, job)) == [DATA_ERROR] * 2
    assert "trains one rank, but this run has 2" in (job.parent / "error.txt").read_text()
