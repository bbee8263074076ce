"""What a finished training stage leaves behind.

Covers: the model, the running mean of its weights, `result.json`.
Not here: checkpoints, metrics.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from evaclip_model.clip import EvaClip
from evaclip_model.training.config import EMA_FOLDER, MODEL_FOLDER
from evaclip_model.training.engine import StateFragment
from evaclip_model.training.whole import whole_tensors
from evaclip_model.weights import save_model


def save_models(
    run_dir: Path, model: EvaClip, fragments: Sequence[StateFragment], rank: int
) -> None:
    """Write `model/`, and `model-ema/` when the fragments have a running mean; all ranks call it.

    Afterwards the model holds what was saved last.
    """
    if rank == 0:
        save_model(model, run_dir / MODEL_FOLDER)
    if not any("ema" in fragment.tensors for fragment in fragments):
        return
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, mean in whole_tensors(model, fragments, "ema"):
            named[name].copy_(mean)
    if rank == 0:
        save_model(model, run_dir / EMA_FOLDER)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a file beside its place and rename it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(value, indent=1) + "\n")
    beside.replace(path)
