"""Small models of every family, and batches for them, for tests of equal results.

Covers: weights under which no part is without effect; captions that end early, late and twice.
Not here: what is compared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evaclip_model.create import create_model
from evaclip_model.model.clip import EvaClip
from evaclip_model.training.training_step import kept_patches

START, END = 98, 99
_TEXT = {"context_length": 20, "vocab_size": 100, "width": 48, "layers": 3, "heads": 3}
_VISION = {"image_px": 32, "patch_px": 8, "width": 64, "layers": 3, "heads": 2, "mlp_width": 96}
FAMILIES: dict[str, dict[str, Any]] = {
    "EVA-01": {
        "mlp": "gelu",
        "fused_qkv": True,
        "sub_norm": False,
        "norm_placement": "pre",
        "layer_scale_init": 0.1,
    },
    "EVA-02": {
        "mlp": "swiglu",
        "fused_qkv": False,
        "sub_norm": True,
        "norm_placement": "pre",
        "rope_reference_grid": 8,
    },
    "EVA-02-E": {
        "mlp": "gelu",
        "fused_qkv": True,
        "sub_norm": False,
        "norm_placement": "residual_post",
    },
}


def small_config(family: str = "EVA-02", **vision: Any) -> dict[str, Any]:
    """The architecture, with fields of its image tower replaced."""
    return {"embed_dim": 32, "vision": {**_VISION, **FAMILIES[family], **vision}, "text": _TEXT}


def small_model(family: str = "EVA-02", *, precision: str = "fp32", **options: Any) -> EvaClip:
    """A model with weights of ordinary size everywhere, the same at every call."""
    vision = options.pop("vision", {})
    model = create_model(small_config(family, **vision), seed=0, **options)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return model.to(dtype or torch.float64)


def small_batch(size: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Images [B, 3, 32, 32], ids [B, 20], kept patches [B, 8]."""
    draw = torch.Generator().manual_seed(2)
    images = torch.randn(size, 3, 32, 32, generator=draw)
    tokens = torch.zeros(size, 20, dtype=torch.long)
    for number, row in enumerate(tokens):
        length = (5, 20, 3, 5, 9, 2, 14)[number % 7]
        row[1 : length - 1] = torch.randint(1, START, (length - 2,), generator=draw)
        row[0], row[length - 1] = START, END
    tokens[0, 8] = END  # behind the first end token
    return images, tokens, kept_patches(0, torch.arange(size), 16, 0.5)
