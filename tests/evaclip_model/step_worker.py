"""One rank: ten steps of a small network on a fixed global batch; rank 0 saves the weights."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from evaclip_model.training.config import TrainConfig
from evaclip_model.training.engine import DeepSpeedEngine, TorchEngine, start_distributed


class Network(nn.Module):
    """Odd sizes, so that partitions cut through parameters; names as a CLIP model's."""

    def __init__(self):
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(13, 13), nn.LayerNorm(13)) for _ in range(3)]
        self.visual = nn.ModuleDict({"blocks": nn.ModuleList(blocks), "head": nn.Linear(13, 3)})
        self.text = nn.ModuleDict({"proj": nn.Linear(13, 5, bias=False)})
        self.logit_scale = nn.Parameter(torch.tensor([4.6]))

    def forward(self, x):
        x = x.to(self.logit_scale.dtype)
        for block in self.visual["blocks"]:
            x = x + torch.tanh(block(x))
        both = torch.cat([self.visual["head"](x), self.text["proj"](x)], dim=1)
        return torch.cat([both.tanh(), self.logit_scale.expand(len(x), 1)], dim=1)


def main(out, engine, options):
    torch.manual_seed(0)
    network = Network()
    data = torch.randn(10, 60, 13)
    target = torch.cat([torch.sin(data[:, :, :8] * 2), torch.full((10, 60, 1), 8.0)], dim=2)
    settings = {"image_px": 4, "samples_seen": 600, "global_batch": 60, "lanes": 6}
    rates = {"lr_vision": 0.05, "lr_text": 0.02, "lr_other": 0.05, "grad_clip_norm": 0.5}
    config = TrainConfig(name="x", **settings, **rates, **options)
    rank, ranks = 0, 1
    if engine == "deepspeed":
        start_distributed("cpu")
        rank, ranks = dist.get_rank(), dist.get_world_size()
        engine = DeepSpeedEngine(network, config)
    else:
        engine = TorchEngine(network, config)
    norms = []
    for x, y in zip(data, target, strict=True):
        x, y = x.chunk(ranks)[rank], y.chunk(ranks)[rank]
        loss = (engine.module(x).float() - y).square().mean()
        engine.backward(loss, last=True)
        norms.append(engine.step(1.0).grad_norm)
    masters = torch.zeros(1)
    for fragment in engine.fragments():
        if fragment.name == "logit_scale":
            masters.copy_(fragment.tensors["param"])
    if ranks > 1:
        dist.all_reduce(masters)
    if rank == 0:
        named = {name: value.detach().clone() for name, value in network.named_parameters()}
        save_file({**named, "norms": torch.tensor(norms), "master": masters}, out)


main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
