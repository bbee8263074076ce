"""A training stage as a task runs it: real launcher, real ranks, a kill in the middle."""

import io
import json
import os
import signal
import tarfile
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from evaclip_model.create import create_model, open_model
from evaclip_model.errors import InputError
from evaclip_model.reading.samples import Shard, ShardManifest
from evaclip_model.training.config import TrainConfig
from evaclip_model.weights import save_model
from tasks.progress import silent
from tasks.train.train import train_model

SAMPLES = 24
VISION = {"image_px": 8, "patch_px": 4, "width": 16, "layers": 1, "heads": 2, "mlp_width": 32}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "layers": 1, "heads": 2}
KIND = {"mlp": "swiglu", "fused_qkv": False, "sub_norm": True, "norm_placement": "pre"}
ROPE = {"rope_reference_grid": 2, "layer_scale_init": None}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One shard of 24 samples, and a tiny model to start from."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number in range(SAMPLES):
            image = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(image, "png")
            record = {"uid": str(number), "source": "a"}
            members = {"png": image.getvalue(), "txt": b"thing %d" % number}
            for extension, content in {**members, "json": json.dumps(record).encode()}.items():
                member = tarfile.TarInfo(f"{number:03d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    size = (folder / "0.tar").stat().st_size
    shard = Shard(path="0.tar", source="a", samples=SAMPLES, bytes=size, sha256="0" * 64)
    ShardManifest(shards=(shard,)).write(folder / "shards.json")
    architecture = {"embed_dim": 8, "vision": {**VISION, **KIND, **ROPE}, "text": TEXT}
    save_model(create_model(architecture, seed=0), folder / "start")
    return folder


def config(**changes):
    settings = {"name": "tiny", "image_px": 8, "samples_seen": 12 * 60, "global_batch": 12}
    settings |= {"lanes": 4, "warmup_steps": 2, "checkpoint_every_steps": 10}
    return TrainConfig(**{**settings, **changes})


def train(data, out, ranks, report=silent, **changes):
    return train_model(config(**changes), data / "start", data / "shards.json", out, ranks, report)


def ranks_of(out):
    """Processes that run the job in `out`, without launcher and supervisor."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if line[-1:] == [str(out / "train.json")] and not any("distributed.run" in p for p in line):
            found.append(process)
    return [process for process in found if "supervise" not in " ".join(process.info["cmdline"])]


def test_a_rank_killed_in_the_middle_is_restarted_and_the_stage_is_whole(data, tmp_path):
    told = []
    killed = []

    def report(done: float, total: float, detail: str = "") -> None:
        told.append((done, total, detail))
        if done >= 12 and not killed:
            victim = ranks_of(tmp_path)[0]
            os.kill(victim.pid, signal.SIGKILL)
            killed.append(victim.pid)

    made = train(data, tmp_path, 2, report)

    assert killed
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert made.counts["steps"] == 60
    assert made.counts["a.samples"] == made.counts["samples_seen"] == 720
    assert told[-1][:2] == (60, 60)
    assert any("images/s" in detail and "left" in detail for _, _, detail in told)
    names = {str(path.relative_to(tmp_path)) for path in made.files}
    kept = {"train.json", "metrics.jsonl", "result.json"}
    assert names == kept | {"model/config.json", "model/model.safetensors"}
    assert open_model(tmp_path / "model").config.vision.image_px == 8
    assert ranks_of(tmp_path) == []

    again = train(data, tmp_path, 2)
    assert again.counts == made.counts


def test_a_stage_at_another_resolution_starts_from_resized_positions(data, tmp_path):
    train(data, tmp_path, 1, image_px=12, samples_seen=24, patch_dropout=0.0)
    assert open_model(tmp_path / "model").config.vision.image_px == 12


def test_what_a_user_can_mend_is_one_sentence(data, tmp_path):
    with pytest.raises(InputError, match=r"training stage 'tiny': source_weights names 'b'"):
        train(data, tmp_path, 1, source_weights={"b": 1.0})


def test_a_diverging_run_says_so(data, tmp_path):
    wild = {"optimizer": "adamw", "lr_vision": 1e30, "lr_text": 1e30, "grad_clip_norm": None}
    with pytest.raises(InputError, match=r"the loss is nan at step \d+: lower the learning rate"):
        train(data, tmp_path, 1, **wild)


def test_nothing_is_left_when_the_caller_is_interrupted(data, tmp_path):
    def report(done: float, total: float, detail: str = "") -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(data, tmp_path, 1, report)
    assert ranks_of(tmp_path) == []
    assert not (tmp_path / "result.json").exists()
    assert Path(tmp_path / "metrics.jsonl").exists()
