"""One rank: steps of a small network on a fixed global batch; rank 0 saves weights and figures.

Arguments: file to write, engine, JSON of settings of `TrainConfig`, and besides them
`steps`; `parts` that a rank's share comes in; `thrown_away`: steps before which some gradient is
made and forgotten; `overflow`: steps whose loss is infinite; `stop_after` a step, where the state
is stored, and taken up by a second engine.
"""

import json
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from evaclip_model.training.checkpoint.save_and_load import gather_weights
from evaclip_model.training.config import TrainConfig
from evaclip_model.training.engine.engine import (
    DeepSpeedEngine,
    LossScaleExhausted,
    TorchEngine,
    start_distributed,
)


class Network(nn.Module):
    """Odd sizes, so that partitions cut through parameters; matrices of several norms in a layer,
    so that one ratio for all is wrong; names as a CLIP model's."""

    def __init__(self):
        super().__init__()
        blocks = [
            nn.Sequential(nn.Linear(13, 17), nn.Tanh(), nn.Linear(17, 13), nn.LayerNorm(13))
            for _ in range(3)
        ]
        self.visual = nn.ModuleDict({"blocks": nn.ModuleList(blocks), "head": nn.Linear(13, 3)})
        self.text = nn.ModuleDict({"proj": nn.Linear(13, 5, bias=False)})
        self.logit_scale = nn.Parameter(torch.tensor([4.6]))
        for block in blocks:
            block[2].weight.data.mul_(4)
            block[3].bias.data.normal_()  # of zeros no difference would be small

    def forward(self, x):
        x = x.to(self.logit_scale.dtype)
        for block in self.visual["blocks"]:
            x = x + torch.tanh(block(x))
        both = torch.cat([self.visual["head"](x), self.text["proj"](x)], dim=1)
        return torch.cat([both.tanh(), self.logit_scale.expand(len(x), 1)], dim=1)


MOST = 20
"""Steps there is data for."""


def make_engine(kind, config, parts):
    torch.manual_seed(0)
    network = Network()
    if kind == "torch":
        return network, TorchEngine(network, config)
    return network, DeepSpeedEngine(network, config, accumulates=parts > 1)


def main(out, kind, options):
    steps, parts = options.pop("steps", 10), options.pop("parts", 1)
    thrown_away, overflow = options.pop("thrown_away", []), options.pop("overflow", [])
    stop_after = options.pop("stop_after", None)
    settings = {"image_px": 4, "samples_seen": 600, "global_batch": 60, "lanes": 6}
    rates = {"lr_vision": 0.05, "lr_text": 0.02, "lr_other": 0.05, "grad_clip_norm": 0.5}
    config = TrainConfig(**{"name": "x", **settings, **rates, **options})
    rank, ranks = 0, 1
    if kind == "deepspeed":
        start_distributed("cpu")
        rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    data = torch.randn(MOST, 60, 13)
    target = torch.cat([torch.sin(data[:, :, :8] * 2), torch.full((MOST, 60, 1), 8.0)], dim=2)
    network, engine = make_engine(kind, config, parts)

    def backward(x, y, factor):
        """Mean loss of this rank's rows, its gradient added up in parts; returns the loss."""
        total = 0.0
        for number, (some_x, some_y) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
            loss = (engine.module(some_x).float() - some_y).square().mean() / parts
            engine.backward(loss * factor, last=number == parts - 1)
            total += loss.detach()
        return total

    figures = {"losses": [], "norms": [], "scales": [], "skipped": [], "clipped": [], "trust": []}
    exhausted = 0
    for step, (x, y) in enumerate(zip(data[:steps], target[:steps], strict=True)):
        x, y = x.chunk(ranks)[rank], y.chunk(ranks)[rank]
        if step in thrown_away:
            backward(y.sum(dim=1, keepdim=True) * x, y, 3.0)
            engine.grad_norms()
            engine.discard_gradient()
        # Only one rank's gradient is infinite: all must agree on it.
        bad = step in overflow and rank == ranks - 1
        loss = backward(x, y, math.inf if bad else 1.0)
        norms = engine.grad_norms()
        try:
            stepped = engine.step(1.0)
        except LossScaleExhausted:
            exhausted = step
            break
        figures["losses"].append(loss)
        figures["norms"].append([norms[name] for name in ("total", "vision", "text", "other")])
        figures["scales"].append(stepped.loss_scale or 0)
        figures["skipped"].append(stepped.skipped)
        figures["clipped"].append(stepped.clipped)
        figures["trust"].append(stepped.trust.get("vision", (0, 0, 0)))
        if step == stop_after:
            stored = [
                {kind: tensor.clone() for kind, tensor in fragment.tensors.items()}
                for fragment in engine.state_fragments()
            ]
            counters = json.loads(json.dumps(engine.step_counters()))
            network, engine = make_engine(kind, config, parts)
            for fragment, kept in zip(engine.state_fragments(), stored, strict=True):
                for kind_of, tensor in kept.items():
                    fragment.tensors[kind_of].copy_(tensor)
            engine.restore_counters(counters)
    named = {name: value.detach().clone() for name, value in network.named_parameters()}
    for kind_of in ("param", *(["ema"] if config.ema_decay else [])):
        for name, whole in gather_weights(network, engine.state_fragments(), kind_of):
            named[f"{kind_of}.{name}"] = whole.clone()
    results = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in figures.items()}
    if ranks > 1:
        dist.all_reduce(results["losses"])
        results["losses"] /= ranks
        everyones = [torch.empty_like(results["norms"]) for _ in range(ranks)]
        dist.all_gather(everyones, results["norms"])
        assert all(torch.equal(one.nan_to_num(), everyones[0].nan_to_num()) for one in everyones)
    if rank == 0:
        save_file({**named, **results, "exhausted": torch.tensor(exhausted)}, out)


main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
