"""Training end to end on a few real shards: any number of ranks, killed and resumed."""

import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from evaclip_model.clip import create_model
from evaclip_model.samples import Shard, ShardManifest
from evaclip_model.train import DATA_ERROR, RESUMABLE
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
COLOURS = ["red", "green", "blue", "white", "black", "yellow", "purple", "orange"]


def write_shard(path, source, names, rng):
    with tarfile.open(path, "w") as tar:
        for name in names:
            pixels = rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)
            image = io.BytesIO()
            Image.fromarray(pixels).save(image, "png")
            record = json.dumps({"uid": name, "source": source}).encode()
            caption = f"a {COLOURS[int(name) % 8]} thing number {name}".encode()
            for extension, data in (
                ("png", image.getvalue()),
                ("txt", caption),
                ("json", record),
            ):
                member = tarfile.TarInfo(f"{name}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two sources in five shards, and a tiny model to start from."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    shards, first = [], 0
    for source, sizes in {"a": [20, 15, 13], "b": [10, 14]}.items():
        for number, size in enumerate(sizes):
            path = folder / f"{source}{number}.tar"
            write_shard(path, source, [f"{first + i:05d}" for i in range(size)], rng)
            first += size
            shards.append(
                Shard(
                    path=path.name,
                    source=source,
                    samples=size,
                    bytes=path.stat().st_size,
                    sha256="0" * 64,
                )
            )
    ShardManifest(shards=tuple(shards)).write(folder / "shards.json")
    save_model(create_model(TINY, seed=0), folder / "start")
    return folder


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


def start(job, ranks):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": "lo",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        with (job.parent / f"rank-{rank}.log").open("ab") as log:
            command = [sys.executable, "-m", "evaclip_model.train", str(job)]
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    return processes


def finish(processes, job, expected=0):
    try:
        codes = [process.wait(120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "".join(path.read_text()[-2000:] for path in job.parent.glob("rank-*.log"))
    assert codes == [expected] * len(processes), logs
    return [json.loads(line) for line in (job.parent / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def two_ranks(data, tmp_path_factory):
    """An uninterrupted run of two ranks: its folder and its metrics."""
    job = write_job(data, tmp_path_factory.mktemp("two"))
    return job.parent, finish(start(job, 2), job)


def test_two_ranks_lose_what_one_loses(data, two_ranks, tmp_path):
    job = write_job(data, tmp_path / "one", engine="torch")
    alone = finish(start(job, 1), job)
    folder, together = two_ranks
    assert [row["step"] for row in together] == list(range(1, 21))
    for ours, theirs in zip(together, alone, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert together[-1]["loss"] < together[0]["loss"]
    result = json.loads((folder / "result.json").read_text())
    assert result["source_samples"] == {"a": 384, "b": 96}


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_whose_rank_is_killed_ends_like_one_that_is_not(data, two_ranks, tmp_path, seed):
    folder, expected = two_ranks
    job = write_job(data, tmp_path / "killed")
    chance = random.Random(seed)
    after = chance.randrange(1, 18)
    processes = start(job, 2)
    metrics = job.parent / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and lines(metrics) < after:
        time.sleep(0.002)
    victim = processes[chance.randrange(2)]
    victim.send_signal(signal.SIGKILL)
    for process in processes:
        process.kill()
        process.wait()
    assert lines(metrics) < 20

    rows = finish(start(job, 2), job)

    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]
    ours, theirs = (load_file(at / "model/model.safetensors") for at in (job.parent, folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_run_asked_to_stop_saves_and_another_number_of_ranks_goes_on(data, two_ranks, tmp_path):
    _, expected = two_ranks
    job = write_job(data, tmp_path / "stopped", checkpoint_every_steps=1000)
    processes = start(job, 2)
    metrics = job.parent / "metrics.jsonl"
    while lines(metrics) < 3:
        time.sleep(0.002)
    processes[1].send_signal(signal.SIGTERM)
    done = len(finish(processes, job, expected=RESUMABLE))
    assert (job.parent / "resumable").exists()
    assert [path.name for path in (job.parent / "checkpoints").iterdir()] == [f"step-{done:08d}"]

    rows = finish(start(job, 3), job)

    for ours, theirs in zip(rows, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_a_users_mistake_is_one_sentence(data, tmp_path):
    job = write_job(data, tmp_path / "wrong", engine="torch", source_weights={"c": 1.0})
    process = start(job, 1)[0]
    assert process.wait(60) == DATA_ERROR
    assert "'c'" in (job.parent / "error.txt").read_text()
