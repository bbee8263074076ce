"""Training end to end on a few real shards: any number of ranks, killed and resumed."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evaclip_model.create import create_model
from evaclip_model.training.captions import vary_caption
from evaclip_model.training.config import TrainConfig
from evaclip_model.training.worker import DATA_ERROR, RESUMABLE
from evaclip_model.weights import save_model

TINY = {
    "embed_dim": 16,
    "vision": {
        "image_px": 16,
        "patch_px": 4,
        "width": 16,
        "layers": 2,
        "heads": 2,
        "mlp_width": 43,
        "mlp": "swiglu",
        "fused_qkv": False,
        "sub_norm": True,
        "norm_placement": "pre",
        "rope_reference_grid": 4,
        "layer_scale_init": None,
    },
    "text": {"context_length": 77, "vocab_size": 49408, "width": 16, "layers": 1, "heads": 2},
}


@pytest.fixture(scope="module")
def data(small_shards):
    """Two sources in five shards, and a tiny model to start from."""
    save_model(create_model(TINY, seed=0), small_shards / "start")
    return small_shards


def write_job(data, run_dir, *, engine="deepspeed", **changes):
    settings = {
        "name": "tiny",
        "image_px": 16,
        "samples_seen": 20 * 24,
        "global_batch": 24,
        "lanes": 6,
        "shuffle_buffer": 4,
        "lr_vision": 2e-2,
        "lr_text": 2e-2,
        "lr_other": 1e-2,
        "warmup_steps": 3,
        "grad_clip_norm": 1.0,
        "source_weights": {"a": 0.8, "b": 0.2},
        "checkpoint_every_steps": 4,
        **changes,
    }
    run_dir.mkdir(exist_ok=True)
    job = {
        "train": settings,
        "start_from": str(data / "start"),
        "shards": str(data / "shards.json"),
        "run_dir": str(run_dir),
        "engine": engine,
        "threads": 1,
    }
    (run_dir / "train.json").write_text(json.dumps(job))
    return run_dir / "train.json"


def start(ranks, count, job):
    return ranks.start(count, job.parent, "evaclip_model.training.worker", job)


def finish(ranks, pids, job, expected=0):
    codes = ranks.wait(pids)
    logs = "".join(path.read_text()[-2000:] for path in job.parent.glob("rank-*.log"))
    assert codes == [expected] * len(pids), logs
    return [json.loads(line) for line in (job.parent / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def two_ranks(data, ranks, tmp_path_factory):
    """An uninterrupted run of two ranks: its folder and its metrics."""
    job = write_job(data, tmp_path_factory.mktemp("two"))
    return job.parent, finish(ranks, start(ranks, 2, job), job)


def test_two_ranks_lose_what_one_loses(data, ranks, two_ranks, tmp_path):
    job = write_job(data, tmp_path / "one", engine="torch")
    alone = finish(ranks, start(ranks, 1, job), job)
    folder, together = two_ranks
    assert [row["step"] for row in together] == list(range(1, 21))
    for ours, theirs in zip(together, alone, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert together[-1]["loss"] < together[0]["loss"]
    result = json.loads((folder / "result.json").read_text())
    assert result["source_samples"] == {"a": 384, "b": 96}


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_whose_rank_is_killed_ends_like_one_that_is_not(
    data, ranks, two_ranks, tmp_path, seed
):
    folder, expected = two_ranks
    job = write_job(data, tmp_path / "killed")
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


def wait_for(metrics: Path, count: int) -> None:
    deadline = time.monotonic() + 100
    while lines(metrics) < count:
        assert time.monotonic() < deadline, "no steps are made"
        time.sleep(0.002)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_run_asked_to_stop_saves_and_another_number_of_ranks_goes_on(
    data, ranks, two_ranks, tmp_path
):
    _, expected = two_ranks
    job = write_job(data, tmp_path / "stopped", checkpoint_every_steps=1000)
    pids = start(ranks, 2, job)
    wait_for(job.parent / "metrics.jsonl", 3)
    os.kill(pids[1], signal.SIGTERM)
    done = len(finish(ranks, pids, job, expected=RESUMABLE))
    assert (job.parent / "resumable").exists()
    assert [path.name for path in (job.parent / "checkpoints").iterdir()] == [f"step-{done:08d}"]

    rows = finish(ranks, start(ranks, 3, job), job)

    for ours, theirs in zip(rows, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_a_users_mistake_is_one_sentence(data, ranks, tmp_path):
    job = write_job(data, tmp_path / "wrong", engine="torch", source_weights={"c": 1.0})
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
