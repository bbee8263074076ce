"""One rank: 20 steps of a small model in each of some numbers of parts.

ENGINE OPTIONS PARTS FOLDER: rank 0 saves losses and weights to `FOLDER/parts.safetensors`.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from evaclip_model.training.config import TrainConfig
from evaclip_model.training.engine.engine import DeepSpeedEngine, TorchEngine, start_distributed
from evaclip_model.training.loss.objective import make_objective
from evaclip_model.training.training_step import forward_backward, step_inputs
from tests.evaclip_model.plain_loss import teachers_of
from tests.evaclip_model.small_models import small_batch, small_model

STEPS, SAMPLES = 20, 24
RATES = {"lr_vision": 2e-2, "lr_text": 2e-2, "lr_other": 1e-2, "drop_path": 0.3}


def train(engine, parts, options):
    options = {"samples_seen": STEPS * SAMPLES, "global_batch": SAMPLES, **RATES, **options}
    config = TrainConfig(name="x", image_px=32, lanes=6, warmup_steps=3, **options)
    model = small_model().train()
    for name, value in make_objective(config).parameters.items():
        if getattr(model, name, None) is None:
            setattr(model, name, torch.nn.Parameter(torch.full((1,), value)))
    model.set_drop_path(config.drop_path)
    model.set_grad_checkpointing(config.grad_checkpointing)
    engine = (DeepSpeedEngine if engine == "deepspeed" else TorchEngine)(model, config)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = SAMPLES // ranks
    draw = torch.Generator().manual_seed(0)
    _, tokens, _ = small_batch(SAMPLES)
    losses = []
    for step in range(STEPS):
        images = torch.randint(0, 256, (SAMPLES, 3, 32, 32), dtype=torch.uint8, generator=draw)
        own = slice(rank * share, (rank + 1) * share)
        positions = torch.arange(SAMPLES) + step * SAMPLES
        vision = model.config.vision
        inputs = step_inputs(config, vision, step, images[own], tokens[own], positions[own])
        micro_batch = share // parts
        known = teachers_of(SAMPLES, [5, 9]) if config.teacher else ()
        terms = forward_backward(
            engine,
            inputs.split_parts(micro_batch),
            make_objective(config),
            teachers=[one[own] for one in known],
        )
        if ranks > 1:
            dist.all_reduce(terms.loss)
        losses.append(terms.loss / ranks)
        engine.step(1.0)
    named = {name: value.detach().clone() for name, value in model.named_parameters()}
    return rank, {**named, "losses": torch.stack(losses)}


def main(engine, options, numbers, folder):
    torch.set_num_threads(1)
    if engine == "deepspeed":
        start_distributed("cpu")
    for parts in numbers:
        rank, found = train(engine, parts, options)
        if rank == 0:
            save_file(found, folder / f"{parts}.safetensors")


main(sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3]), Path(sys.argv[4]))
