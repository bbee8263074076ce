"""Captions of different lengths as one stream of tokens.

Covers: where a caption ends, which captions are grouped at one length, and the stream's indices.
Not here: attention inside the groups (layers.py).

Attention is causal and features are pooled at the first end token, so nothing behind it has any
influence: leaving it out, or having other tokens there, changes neither features nor gradients.
Captions are sorted by length and cut into groups of equal length; a group is as long as its longest
caption. Linear layers see the whole stream at once, attention one group at a time.

On a CPU a few tokens that nothing looks at fill the stream up to one of a few lengths: for every
new one oneDNN compiles each product anew, and it keeps a thousand of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

GROUP_COST = {"cpu": 6}
GROUP_COST_ELSEWHERE = 1024
"""Tokens whose computation takes as long as one more group does by itself: a few small calls on a
CPU, launches that a whole batch of short captions would not outlast on an accelerator."""


@dataclass(frozen=True)
class Packing:
    """Places of the tokens of a batch [B, L] in its stream [S]."""

    groups: tuple[tuple[int, int], ...]
    """(captions, tokens of each) in the stream's order; their products add up to S. Filling tokens
    come last, as captions of one."""
    tokens: Tensor
    """[S] ids."""
    positions: Tensor
    """[S] place of each token in its caption; 0 of filling ones."""
    ends: Tensor
    """[B] place in the stream of each caption's end token, in the batch's order."""


def pack_padded(tokens: Tensor) -> Packing:
    """Pack ids [B, L] as one group of full length: no size depends on them, so it can be traced."""
    captions, length = tokens.shape
    positions = torch.arange(length, device=tokens.device).expand(captions, length)
    starts = torch.arange(captions, device=tokens.device) * length
    return Packing(
        ((captions, length),),
        tokens.flatten(),
        positions.flatten(),
        starts + tokens.argmax(dim=1),
    )


def pack_captions(tokens: Tensor, device: torch.device) -> Packing:
    """Plan the stream of a batch, on the CPU, and send it to `device` without waiting.

    Args:
        tokens: [B, L] ids; the end token has the highest id, and its first place is the end. Ids
            on an accelerator are fetched first, which waits for it.
        device: where the stream will be computed.
    """
    ids = tokens.cpu().numpy()
    ends = ids.argmax(axis=1)
    order = np.argsort(ends, kind="stable")
    groups = group_lengths(np.bincount(ends + 1), GROUP_COST.get(device.type, GROUP_COST_ELSEWHERE))
    counts, lengths = np.array(groups).T
    rows = np.repeat(lengths, counts)  # [B] tokens of each sorted caption
    starts = np.cumsum(rows) - rows
    total = int(rows.sum())
    positions = np.arange(total) - np.repeat(starts, rows)
    stream = ids[np.repeat(order, rows), positions]
    places = np.empty_like(starts)
    places[order] = starts + ends[order]
    if device.type == "cpu" and (fill := filled_length(total) - total):
        groups = (*groups, (fill, 1))
        positions, stream = (np.pad(array, (0, fill)) for array in (positions, stream))
    return Packing(
        groups,
        *(
            torch.from_numpy(array).to(device, non_blocking=True)
            for array in (stream, positions, places)
        ),
    )


def filled_length(tokens: int) -> int:
    """The next of 32 lengths between a power of two and its double: at most a 32nd longer."""
    step = max(1, (1 << tokens.bit_length() - 1) // 32)
    return -(-tokens // step) * step


def group_lengths(histogram: np.ndarray, group_cost: int) -> tuple[tuple[int, int], ...]:
    """Cheapest cut of captions, sorted by length, into groups as long as their longest.

    Args:
        histogram: [longest + 1] captions of each length.
        group_cost: what a group costs beside its tokens, in tokens.

    Returns:
        (captions, length) of each group, shortest first.
    """
    lengths = np.flatnonzero(histogram)
    below = np.concatenate(([0], np.cumsum(histogram[lengths])))  # captions before each length
    best = np.zeros(len(lengths) + 1)  # cost of the captions below the i-th length
    cut = np.zeros(len(lengths) + 1, dtype=int)
    for end in range(1, len(lengths) + 1):
        cost = best[:end] + (below[end] - below[:end]) * lengths[end - 1] + group_cost
        cut[end] = cost.argmin()
        best[end] = cost[cut[end]]
    groups = []
    end = len(lengths)
    while end:
        groups.append((int(below[end] - below[cut[end]]), int(lengths[end - 1])))
        end = cut[end]
    return tuple(reversed(groups))
