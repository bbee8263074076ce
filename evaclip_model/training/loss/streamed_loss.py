"""The contrastive loss without a matrix of logits in memory.

Covers: loss, accuracies and gradients, logits made chunk by chunk and again in the backward pass.
Not here: the choice between this and keeping the logits (softmax.py), exchange between ranks
(contrastive.py).

Each row's highest logit, and the sum of the exponentials below it, are built up over chunks of
columns; the backward pass needs no more than these two. Kept apart they lose nothing: the logarithm
of the whole sum would be rounded at the size of the logits. Memory: a chunk, whatever the batch.

Shapes: b rows of a rank, B columns of all, E joint channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK_ROWS = 2048
CHUNK_COLUMNS = 4096
"""Rows and columns of logits in memory at once: 32 MiB in float32, enough for full matrix speed."""


def streamed_terms(
    image: Tensor,
    text: Tensor,
    all_image: Tensor,
    all_text: Tensor,
    scale: Tensor,
    first_row: int,
    smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, image-to-text and text-to-image accuracy of the rows, all []; see `gathered_terms`.

    Args:
        image, text: [b, E] rows.
        all_image, all_text: [B, E] columns; row i belongs to column `first_row` + i.
        scale: [] inverse temperature.
        smoothing: share of each row's target that is spread evenly over all columns.
    """
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
