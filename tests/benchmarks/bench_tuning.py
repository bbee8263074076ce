"""A training step whole, with frozen blocks, and with low-rank updates: CPU seconds, memory, state.

B/16 with random weights in plain torch, each way in a process of its own: `python -m
tests.benchmarks.bench_tuning`.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from statistics import median

import torch

from evaclip_model import contrastive_loss, create_model, tokenize
from evaclip_model.training.config import TrainConfig
from evaclip_model.training.engine.engine import TorchEngine
from evaclip_model.training.trainer import add_updates

PAIRS, STEPS = 8, 3
WAYS = {
    "all weights": {},
    "frozen: embeddings, text, 6 of 12 blocks": {
        "freeze": ("vision.patch_embed", "vision.blocks.0-5", "text")
    },
    "LoRA of rank 8 on q, v and in_proj": {
        "lora": {"rank": 8, "alpha": 16, "on": ("q_proj", "v_proj", "in_proj")}
    },
    "the same, with frozen text and 6 blocks": {
        "lora": {"rank": 8, "alpha": 16, "on": ("q_proj", "v_proj")},
        "freeze": ("vision.blocks.0-5", "text"),
    },
}


def main() -> None:
    print("| trained | CPU s of a step | peak memory, GB | a checkpoint, MB |\n|---|--:|--:|--:|")
    for way in WAYS:
        done = subprocess.run(
            [sys.executable, "-m", __spec__.name, way], check=True, capture_output=True, text=True
        )
        found = json.loads(done.stdout)
        print(f"| {way} | {found['step_s']:.2f} | {found['peak']:.2f} | {found['state']:,.0f} |")


def measure_way(way: str) -> dict[str, float]:
    given = {"name": "x", "image_px": 224, "samples_seen": PAIRS, "global_batch": PAIRS, "lanes": 1}
    config = TrainConfig.model_validate({**given, "optimizer": "adamw", **WAYS[way]})
    model = create_model("EVA02-CLIP-B-16", seed=0).train()
    if config.lora is not None:
        add_updates(model, config)
    engine = TorchEngine(model, config)
    images = torch.randn(PAIRS, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    tokens = tokenize([f"a photo of thing number {number} on a table" for number in range(PAIRS)])
    took = []
    for _ in range(STEPS):
        before = time.process_time()
        engine.backward(contrastive_loss(*model(images, tokens)), last=True)
        engine.step(1.0)
        took.append(time.process_time() - before)
    held = [one.nbytes for piece in engine.state_fragments() for one in piece.tensors.values()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"step_s": median(took[1:]), "peak": peak / 1e9, "state": sum(held) / 1e6}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure_way(sys.argv[1])))
    else:
        main()
