"""Whole fp32 tensors, put together from the fragments that all ranks hold.

Covers: the masters, or their running mean, parameter by parameter.
Not here: files (weights/load.py writes models, checkpoint/ the fragments themselves).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from evaclip_model.training.engine.engine import StateFragment


@torch.no_grad()
def whole_tensors(
    model: nn.Module, fragments: Sequence[StateFragment], kind: str
) -> Iterator[tuple[str, Tensor]]:
    """Name and fp32 value of every parameter of the trained `model`, one after the other.

    Every rank runs through all of it, and gets the same; one tensor at a time is whole. Frozen
    parameters come as the model holds them.

    Args:
        fragments: this rank's, of the engine that trains the model.
        kind: which tensor of the fragments: "param" (the master) or "ema" (its running mean).
    """
    held: dict[str, list[StateFragment]] = {}
    for fragment in fragments:
        held.setdefault(fragment.name, []).append(fragment)
    together = dist.is_initialized() and dist.get_world_size() > 1
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            yield name, parameter.float()
            continue
        value = torch.zeros(parameter.numel(), device=parameter.device)
        for fragment in held.get(name, []):
            piece = fragment.tensors[kind]
            value.narrow(0, fragment.offset, piece.numel()).copy_(piece)
        if together:
            dist.all_reduce(value)
        yield name, value.view(parameter.shape)
