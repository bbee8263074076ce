"""The outputs of a finished training stage: whole fp32 weights, or their running mean, from the
fragments that all ranks hold."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evaclip_model.create import create_model
from evaclip_model.files import write_atomically
from evaclip_model.model.clip import EvaClip
from evaclip_model.training.checkpoint.consensus import Peers
from evaclip_model.training.config import EMA_FOLDER, MODEL_FOLDER
from evaclip_model.training.engine.engine import StateFragment
from evaclip_model.weights.load import save_model


def save_models(
    run_dir: Path, start: Path, model: EvaClip, fragments: Sequence[StateFragment], rank: int
) -> None:
    """Write `model/`, and `model-ema/` when the fragments have a running mean; all ranks call it.

    The files hold the fp32 masters, not their rounding; and what was frozen as `start`, the model
    that was begun with, has it. On rank 0 the model is used up: it ends in fp32 on the CPU.
    """
    folders = {"param": MODEL_FOLDER}
    if any("ema" in fragment.tensors for fragment in fragments):
        folders["ema"] = EMA_FOLDER
    found: dict[str, dict[str, Tensor]] = {kind: {} for kind in folders}
    for kind, values in found.items():
        for name, value in gather_weights(model, fragments, kind):
            if rank == 0:
                values[name] = value.cpu()
    if rank != 0:
        return
    if model.logit_scale.dtype != torch.float32:
        given = dict(create_model(model.config, weights=start).named_parameters())
        for name, parameter in model.named_parameters():
            plain = re.sub(r"parametrizations\.(\w+)\.original$", r"\1", name)
            if not parameter.requires_grad and plain in given:
                for values in found.values():
                    values[name] = given[plain]
    model.to("cpu", torch.float32)
    for kind, folder in folders.items():
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(found[kind][name])
        save_model(model, run_dir / folder)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as indented JSON, never seen half-written."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")


@torch.no_grad()
def gather_weights(
    model: nn.Module, fragments: Sequence[StateFragment], kind: str
) -> Iterator[tuple[str, Tensor]]:
    """Name and fp32 value, of the parameter's shape, of every parameter of the trained `model`, one
    after the other; `kind` of the fragments' tensors is "param" (the master) or "ema". Every rank
    runs through all of it, and gets the same. Frozen ones come as the model holds them."""
    held: dict[str, list[StateFragment]] = {}
    for fragment in fragments:
        held.setdefault(fragment.name, []).append(fragment)
    peers = Peers.every_rank()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            yield name, parameter.float()
            continue
        value = torch.zeros(parameter.numel(), device=parameter.device)
        for fragment in held.get(name, []):
            piece = fragment.tensors[kind]
            value.narrow(0, fragment.offset, piece.numel()).copy_(piece)
        yield name, peers.add_up(value).view(parameter.shape)
