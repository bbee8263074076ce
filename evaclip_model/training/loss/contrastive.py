"""The symmetric contrastive loss (CLIP, figure 3), in one process or over many: loss and accuracies
of a global batch, in at least float32, with the logits in memory or streamed.

Streamed, each row's highest logit, and the sum of the exponentials below it, are built up over
chunks of columns; the backward pass makes the logits again and needs no more than these two. Kept
apart they lose nothing: the logarithm of the whole sum would be rounded at the size of the logits.
Memory: a chunk, whatever the batch.

Shapes: b samples of a rank, B samples of the global batch, E joint channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from evaclip_model.model.layers import to_float32
from evaclip_model.training.config import LossSettings
from evaclip_model.training.loss.objective import LossTerms

CHUNK_ROWS = 2048
CHUNK_COLUMNS = 4096
"""Rows and columns of logits in memory at once: 32 MiB in float32, enough for full matrix speed."""
_PLAIN = LossSettings()


def contrastive_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """Loss [] in nats of a whole batch in one process.

    Args:
        image_features, text_features: [B, E] of unit length; row i of both is one sample.
        logit_scale: [] inverse temperature, already exponentiated.
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
    image, text = to_float32(image_features), to_float32(text_features)
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
        group: none for all ranks. A group of one needs no communication.

    Raises: ValueError: images and captions are not pairs of features of one size.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return contrastive_terms(image_features, text_features, logit_scale, settings)
    _require_pairs(image_features, text_features)
    image, text = to_float32(image_features), to_float32(text_features)
    pair = torch.stack((image, text))
    both: Tensor = _Gather.apply(pair, group)  # type: ignore[no-untyped-call]  # [ranks, 2, b, E]
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
        scale = to_float32(logit_scale)
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


def streamed_terms(
    image: Tensor,
    text: Tensor,
    all_image: Tensor,
    all_text: Tensor,
    scale: Tensor,
    first_row: int,
    smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, image-to-text and text-to-image accuracy of the rows [b, E] among the columns [B, E],
    all []; row i belongs to column `first_row` + i; see `gathered_terms`."""
    terms: tuple[Tensor, Tensor, Tensor] = _Streamed.apply(  # type: ignore[no-untyped-call]
        image, text, all_image, all_text, scale, first_row, smoothing
    )
    return terms


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        all_image: Tensor,
        all_text: Tensor,
        scale: Tensor,
        first_row: int,
        smoothing: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        image_sums, image_loss, image_hits = _rows_loss(
            image, all_text, text, scale, first_row, smoothing
        )
        text_sums, text_loss, text_hits = _rows_loss(
            text, all_image, image, scale, first_row, smoothing
        )
        ctx.save_for_backward(image, text, all_image, all_text, scale, *image_sums, *text_sums)
        ctx.first_row, ctx.smoothing = first_row, smoothing
        ctx.mark_non_differentiable(image_hits, text_hits)
        return (image_loss + text_loss) / 2, image_hits, text_hits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        image, text, all_image, all_text, scale, *sums = ctx.saved_tensors
        weight = gradients[0] / (2 * len(image))
        rest = scale, weight, ctx.first_row, ctx.smoothing
        d_image, d_all_text = _rows_gradient(image, all_text, sums[0], sums[1], *rest)
        d_text, d_all_image = _rows_gradient(text, all_image, sums[2], sums[3], *rest)
        d_scale = (d_image * image).sum() + (d_text * text).sum()
        return (
            d_image.mul_(scale),
            d_text.mul_(scale),
            d_all_image.mul_(scale),
            d_all_text.mul_(scale),
            d_scale,
            None,
            None,
        )


def _rows_loss(
    rows: Tensor, columns: Tensor, own: Tensor, scale: Tensor, first_row: int, smoothing: float
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Of rows [b, E] with their `own` columns [b, E]: each row's highest logit and sum of the
    exponentials of the distances to it, both [b]; mean loss and hits []."""
    highest = rows.new_full((len(rows),), -torch.inf)
    sums = torch.zeros_like(highest)
    best = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    for high, wide in _iterate_chunks(len(rows), len(columns)):
        logits = scale * rows[high] @ columns[wide].T
        top, place = logits.max(1)
        # Of equal ones the first, as argmax has it.
        best[high] = torch.where(top > highest[high], place + wide.start, best[high])
        top = torch.maximum(top, highest[high])
        chunk_sums = logits.sub_(top[:, None]).exp_().sum(1)
        sums[high] = sums[high] * (highest[high] - top).exp() + chunk_sums
        highest[high] = top
    targets = (1 - smoothing) * (rows * own).sum(1)
    if smoothing:
        targets = targets + smoothing * (rows @ columns.mean(0))
    labels = torch.arange(first_row, first_row + len(rows), device=rows.device)
    loss = (highest + sums.log() - scale * targets).mean()
    return (highest, sums), loss, (best == labels).float().mean()


def _rows_gradient(
    rows: Tensor,
    columns: Tensor,
    highest: Tensor,
    sums: Tensor,
    scale: Tensor,
    weight: Tensor,
    first_row: int,
    smoothing: float,
) -> tuple[Tensor, Tensor]:
    """`weight` times the gradient of the summed row losses by rows and columns, over `scale`."""
    d_rows, d_columns = torch.zeros_like(rows), torch.zeros_like(columns)
    labels = torch.arange(first_row, first_row + len(rows), device=rows.device)
    for high, wide in _iterate_chunks(len(rows), len(columns)):
        part = scale * rows[high] @ columns[wide].T
        part.sub_(highest[high, None]).exp_().div_(sums[high, None])
        place = labels[high, None] - wide.start
        width = part.shape[1]
        inside = (place >= 0) & (place < width)  # without a branch, nothing waits for a GPU
        part.scatter_add_(1, place.clamp(0, width - 1), (smoothing - 1) * inside.to(part.dtype))
        if smoothing:
            part.sub_(smoothing / len(columns))
        part.mul_(weight)
        d_rows[high].addmm_(part, columns[wide])
        d_columns[wide].addmm_(part.T, rows[high])
    return d_rows, d_columns


def _iterate_chunks(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    for top in range(0, rows, CHUNK_ROWS):
        for left in range(0, columns, CHUNK_COLUMNS):
            yield (
                slice(top, min(top + CHUNK_ROWS, rows)),
                slice(left, min(left + CHUNK_COLUMNS, columns)),
            )
