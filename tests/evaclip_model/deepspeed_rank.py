"""One rank of somebody's DeepSpeed training: a few AdamW steps on given tensors, then a checkpoint.

`deepspeed_rank.py WEIGHTS FOLDER OPTIONS`: parameters have the names of the file's tensors. Beside
the checkpoint rank 0 writes what DeepSpeed itself says is in it, to `FOLDER/truth.safetensors`.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from fp16_on_cpu import allow
from safetensors.torch import load_file, save_file
from torch import nn

from evaclip_model.training.engine.engine import start_distributed

STEPS = 4


class Named(nn.Module):
    """Parameters of any names, dots and all."""

    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            *path, leaf = name.split(".")
            at = self
            for part in path:
                if part not in at._modules:
                    at.add_module(part, nn.Module())
                at = at._modules[part]
            at.register_parameter(leaf, nn.Parameter(tensor.clone()))

    def forward(self, x):
        return sum((value * x).sin().mean() for value in self.parameters())


def main(weights, folder, options):
    start_distributed("cpu")
    import deepspeed

    allow()
    model = Named(load_file(weights))
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    settings = {
        "train_batch_size": 12,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": options["stage"]},
    }
    if options["precision"] != "fp32":
        settings[options["precision"]] = {"enabled": True}
    if options["precision"] == "fp16":
        settings["fp16"]["initial_scale_power"] = 8
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(groups, lr=1e-3),
        config=settings,
        dist_init_required=False,
    )
    for step in range(STEPS):
        engine.backward(engine(1.0 + step + dist.get_rank()))
        engine.step()
    engine.save_checkpoint(str(folder), tag="mine")
    zero, truth = engine.optimizer, {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        moments = zero.optimizer.state[flat]
        for kind, part in {"param": flat, **moments}.items():
            if kind != "step":
                parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
                dist.all_gather(parts, part.detach())
                sizes = [parameter.numel() for parameter in group]
                cuts = torch.cat(parts)[: sum(sizes)].split(sizes)
                for parameter, cut in zip(group, cuts, strict=True):
                    truth[f"{names[parameter]}#{kind}"] = cut.view(parameter.shape)
    if dist.get_rank() == 0:
        save_file({key: value.contiguous() for key, value in truth.items()}, folder / "truth")


main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
