"""The symmetric contrastive loss (CLIP, figure 3), in one process or over many.

Covers: the loss and the accuracies of a global batch, in at least float32, with label smoothing.
Not here: making logits twice (streamed_loss.py) and the choice to do so (softmax.py); averaging of
parameter gradients over ranks, which the engine does.

Shapes: b samples of a rank, B samples of the global batch, E joint channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from evaclip_model.training.loss.objective import LossTerms
from evaclip_model.training.loss.softmax import LossSettings
from evaclip_model.training.loss.streamed_loss import streamed_terms

_PLAIN = LossSettings()


def contrastive_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """Loss of a whole batch in one process.

    Args:
        image_features, text_features: [B, E] of unit length; row i of both is one sample.
        logit_scale: [] inverse temperature, already exponentiated.

    Returns:
        [] in nats.
    """
    return contrastive_terms(image_features, text_features, logit_scale).loss


def gathered_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """This rank's part [] of the loss of a batch spread over ranks; see `gathered_terms`."""
    return gathered_terms(image_features, text_features, logit_scale, group).loss


def contrastive_terms(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    settings: LossSettings = _PLAIN,
) -> LossTerms:
    """Loss and accuracies of a batch [B, E] in one process; arguments as `gathered_terms`."""
    _require_pairs(image_features, text_features)
    image, text = _to_float32(image_features), _to_float32(text_features)
    return _compute_terms(image, text, image, text, logit_scale, 0, settings)


def gathered_terms(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    group: dist.ProcessGroup | None = None,
    settings: LossSettings = _PLAIN,
) -> LossTerms:
    """This rank's rows against the columns of every rank.

    Gradients flow through the gathered columns back to the ranks they came from, so that the mean
    over ranks of each parameter's gradient is the gradient of the whole batch in one process. The
    mean over ranks of the loss (and of the accuracies) is that of the whole batch. There is no
    switch for columns without gradient: that is the gradient of no loss.

    Args:
        image_features, text_features: [b, E] of unit length; the same b on every rank.
        logit_scale: [] inverse temperature.
        group: process group; none for all ranks. A group of one needs no communication.
        settings: how, and how smooth the targets are.

    Raises:
        ValueError: images and captions are not pairs of features of one size.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return contrastive_terms(image_features, text_features, logit_scale, settings)
    _require_pairs(image_features, text_features)
    image, text = _to_float32(image_features), _to_float32(text_features)
    both = _gather_features(torch.stack((image, text)), group)  # [ranks, 2, b, E]
    all_image, all_text = both[:, 0].flatten(0, 1), both[:, 1].flatten(0, 1)  # [B, E]
    first_row = dist.get_rank(group) * len(image)
    return _compute_terms(image, text, all_image, all_text, logit_scale, first_row, settings)


def _compute_terms(
    image: Tensor,
    text: Tensor,
    all_image: Tensor,
    all_text: Tensor,
    logit_scale: Tensor,
    first_row: int,
    settings: LossSettings,
) -> LossTerms:
    with torch.autocast(image.device.type, enabled=False):  # half-precision logits cost accuracy
        scale = _to_float32(logit_scale)
        smoothing = settings.label_smoothing
        if settings.should_stream(len(image), len(all_image)):
            return LossTerms(
                *streamed_terms(image, text, all_image, all_text, scale, first_row, smoothing)
            )
        labels = torch.arange(first_row, first_row + len(image), device=image.device)
        image_logits = scale * image @ all_text.T  # [b, B]
        text_logits = scale * text @ all_image.T
        losses = [
            F.cross_entropy(logits, labels, label_smoothing=smoothing)
            for logits in (image_logits, text_logits)
        ]
    with torch.no_grad():
        image_hits = (image_logits.argmax(1) == labels).float().mean()
        text_hits = (text_logits.argmax(1) == labels).float().mean()
    return LossTerms((losses[0] + losses[1]) / 2, image_hits, text_hits)


def _require_pairs(image: Tensor, text: Tensor) -> None:
    if image.dim() != 2 or image.shape != text.shape:
        raise ValueError(
            f"features of pairs must both be [b, E], not {list(image.shape)} and {list(text.shape)}"
        )


def _gather_features(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    gathered: Tensor = _Gather.apply(local, group)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    """[...] on each rank -> [ranks, ...] on all; gradients are summed over ranks."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        local = local.contiguous()
        gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, local, group=group)
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        gradient = gradient.contiguous()
        if dist.get_backend(ctx.group) == "nccl":
            own = torch.empty_like(gradient[0])
            dist.reduce_scatter_tensor(own, gradient, group=ctx.group)
            return own, None
        dist.all_reduce(gradient, group=ctx.group)  # gloo has no reduce-scatter
        return gradient[dist.get_rank(ctx.group)], None


def _to_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
