"""Training runs of a tiny model in real processes: their jobs, their ends, their metrics.

Covers: what several tests of the trainer begin with.
Not here: what is tested.
"""

import json
import time
from pathlib import Path

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


def job_of(data, run_dir, *, engine="deepspeed", job=None, **changes):
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
    content = {
        "train": settings,
        "start_from": str(data / "start"),
        "shards": str(data / "shards.json"),
        "run_dir": str(run_dir),
        "engine": engine,
        "threads": 1,
        **(job or {}),
    }
    (run_dir / "train.json").write_text(json.dumps(content))
    return run_dir / "train.json"


def start(ranks, count, job):
    return ranks.start(count, job.parent, "evaclip_model.training.worker", job)


def finish(ranks, pids, job, expected=0):
    codes = ranks.wait(pids)
    logs = "".join(path.read_text()[-2000:] for path in job.parent.glob("rank-*.log"))
    assert codes == [expected] * len(pids), logs
    return [json.loads(line) for line in (job.parent / "metrics.jsonl").read_text().splitlines()]


def wait_for(metrics: Path, count: int) -> None:
    deadline = time.monotonic() + 100
    while lines(metrics) < count:
        assert time.monotonic() < deadline, "no steps are made"
        time.sleep(0.002)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
