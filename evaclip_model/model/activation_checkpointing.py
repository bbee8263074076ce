"""Gradient checkpointing: trading a second computation of a block for its activations' memory.

Covers: the three ways, and running one block in one of them; results are the same in all.
Not here: which blocks (vision.py, text.py); checkpoints on disk
(training/checkpoint/write_checkpoint.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from evaclip_model.errors import InputError

GradCheckpointing = Literal["none", "selective", "full"]

_KEPT = {
    "aten::addmm",
    "aten::mm",
    "mkldnn::_linear_pointwise",
    "evaclip::multiply",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "flash_attn::_flash_attn_forward",
}
"""Matrix products and fused attention: nearly all of a block's arithmetic, and a third of what it
would keep. The plain products of eager attention are not here: they are cheap and long."""


def require_mode(mode: str) -> GradCheckpointing:
    """Raises: InputError: there is no such way of checkpointing."""
    for known in get_args(GradCheckpointing):
        if mode == known:
            return known  # type: ignore[no-any-return]
    raise InputError(
        f"grad_checkpointing '{mode}' is unknown: choose one of "
        f"{', '.join(get_args(GradCheckpointing))}"
    )


def run_block(mode: GradCheckpointing, block: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """The block's output; in the backward pass it is computed again, wholly or but for products.

    Args:
        mode: "none" keeps every activation, "selective" the results of matrix products and fused
            attention, "full" the block's input alone.
        block: a function of `inputs`; its random numbers are repeated.
    """
    if mode == "none" or not torch.is_grad_enabled():
        return block(*inputs)
    options: dict[str, Any] = {}
    if mode == "selective":
        options["context_fn"] = functools.partial(
            create_selective_checkpoint_contexts, _choose_policy
        )
    out: Tensor = checkpoint(block, *inputs, use_reentrant=False, **options)
    return out


def _choose_policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = op.name().split(".")[0] in _KEPT
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
