"""What a finished training stage leaves behind.

Covers: the model, the running mean of its weights, `result.json`.
Not here: checkpoints, metrics.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaclip_model.files import write_atomically
from evaclip_model.model.clip import EvaClip
from evaclip_model.training.config import EMA_FOLDER, MODEL_FOLDER
from evaclip_model.training.engine.engine import StateFragment
from evaclip_model.training.engine.gather_weights import whole_tensors
from evaclip_model.weights.load import save_model


def save_models(
    run_dir: Path, model: EvaClip, fragments: Sequence[StateFragment], rank: int
) -> None:
    """Write `model/`, and `model-ema/` when the fragments have a running mean; all ranks call it.

    The files hold the fp32 masters: the next training stage starts from what this one ended with,
    not from its rounding. On rank 0 the model is used up: it ends in fp32 on the CPU.
    """
    averaged = any("ema" in fragment.tensors for fragment in fragments)
    kinds = {"param": MODEL_FOLDER, **({"ema": EMA_FOLDER} if averaged else {})}
    found: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
    for kind, values in found.items():
        for name, value in whole_tensors(model, fragments, kind):
            if rank == 0:
                values[name] = value.cpu()
    if rank != 0:
        return
    model.to("cpu", torch.float32)
    for kind, folder in kinds.items():
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(found[kind][name])
        save_model(model, run_dir / folder)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as indented JSON, never seen half-written."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")
