"""Parameter groups and learning rates, as pure functions.

Covers: which parameters share a learning rate and a weight decay (per tower, layer-wise decay),
and the learning rate at a step.
Not here: the update rules (lamb.py), gradient clipping (training/engine/engine.py). Source: the
paper's Tables 8-10; groups as the authors' code makes them (`visual.`, `text.`, rest).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from evaclip_model.training.config import TrainConfig

Tower = Literal["vision", "text", "other"]
Schedule = Literal["cosine", "linear", "constant"]
TOWERS: tuple[Tower, ...] = ("vision", "text", "other")

_EMBEDDINGS = (
    "patch_embed",
    "pos_embed",
    "cls_token",
    "mask_token",
    "positional_embedding",
    "token_embedding",
)
_POSITIONS = ("pos_embed", "cls_token", "positional_embedding", "logit_scale")
_BLOCK = re.compile(r"blocks\.(\d+)\.")


@dataclass(frozen=True)
class Group:
    """Parameters that are stepped alike."""

    tower: Tower
    layer: int
    lr_peak: float
    """Tower's learning rate times the layer's decay."""
    weight_decay: float
    names: tuple[str, ...]


def parameter_groups(shapes: Iterable[tuple[str, torch.Size]], config: TrainConfig) -> list[Group]:
    """Group parameters by tower, layer and weight decay: vision first, then text, then the rest.

    Args:
        shapes: name and shape of every parameter, in the model's order. Frozen ones are in no
            group.
    """
    parameters = [(name, shape) for name, shape in shapes if not is_frozen(name, config)]
    depths = {tower: _tower_depth(tower, (name for name, _ in parameters)) for tower in TOWERS}
    members: dict[tuple[Tower, int, bool], list[str]] = {}
    for name, shape in parameters:
        tower = tower_of(name)
        decayed = is_decayed(name, shape)
        layer = layer_of(name, depths[tower])
        if _layer_decay(tower, config) == 1:
            layer = depths[tower] + 1
        members.setdefault((tower, layer, decayed), []).append(name)
    return [
        Group(
            tower,
            layer,
            _tower_lr(tower, config) * _layer_decay(tower, config) ** (depths[tower] + 1 - layer),
            config.weight_decay if decayed else 0.0,
            tuple(names),
        )
        for tower_wanted in TOWERS
        for (tower, layer, decayed), names in members.items()
        if tower == tower_wanted
    ]


def tower_of(name: str) -> Tower:
    """The tower a parameter belongs to."""
    if name.startswith("visual."):
        return "vision"
    return "text" if name.startswith("text.") else "other"


def is_frozen(name: str, config: TrainConfig) -> bool:
    """True when `config.freeze` names the parameter, or its tower."""
    return name in config.freeze or tower_of(name) in config.freeze


def layer_of(name: str, depth: int) -> int:
    """0 for embeddings, block + 1 inside the blocks, `depth` + 1 for all that follows them."""
    if any(part in name for part in _EMBEDDINGS):
        return 0
    block = _BLOCK.search(name)
    return int(block.group(1)) + 1 if block else depth + 1


def is_decayed(name: str, shape: torch.Size) -> bool:
    """Matrices and embeddings decay; biases, norms, gains and positions do not."""
    return len(shape) > 1 and not name.endswith(".bias") and name.split(".")[-1] not in _POSITIONS


def lr_factor(
    step: int, warmup_steps: int, total_steps: int, schedule: Schedule = "cosine"
) -> float:
    """Share of the peak learning rate at optimizer step `step`, counted from 0.

    A line from 1/warmup to 1; then half a cosine, or a line, that reaches 0 at `total_steps`; or 1.
    Steps that were not taken count: rate and data stay side by side.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def _tower_lr(tower: Tower, config: TrainConfig) -> float:
    return {"vision": config.lr_vision, "text": config.lr_text, "other": config.lr_other}[tower]


def _layer_decay(tower: Tower, config: TrainConfig) -> float:
    decays = {"vision": config.layer_decay_vision, "text": config.layer_decay_text, "other": 1.0}
    return decays[tower]


def _tower_depth(tower: Tower, names: Iterable[str]) -> int:
    blocks = [_BLOCK.search(name) for name in names if tower_of(name) == tower]
    return max((int(block.group(1)) + 1 for block in blocks if block), default=0)
