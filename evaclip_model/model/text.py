"""The text tower: CLIP's causal transformer, pooled at the first end token, over captions of
different lengths as one stream of tokens.

Attention is causal and features are pooled at the first end token, so what lies behind it changes
neither features nor gradients. Captions are sorted by length and cut into groups, as long as their
longest caption. Linear layers see the whole stream at once, attention one group at a time.

On a CPU a few tokens that nothing looks at fill the stream up to one of a few lengths: for every
new one oneDNN compiles each product anew, and it keeps a thousand of them.

Shapes: B batch, L tokens, S tokens of the packed stream, T width, E joint channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaclip_model.choices import GradCheckpointing
from evaclip_model.cpu.linear import is_traced, linear
from evaclip_model.model.layers import AttentionKernel, TextAttention, TextMlp, run_block
from evaclip_model.model.model_config import TextConfig


class TextBlock(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: TextConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width)
        self.attn = TextAttention(config.width, config.heads, kernel=kernel)
        self.ln_2 = nn.LayerNorm(config.width)
        self.mlp = TextMlp(config.width)

    def forward(
        self, x: Tensor, groups: Sequence[tuple[int, int]], rows: Tensor | None = None
    ) -> Tensor:
        """x [S, T] of captions in `groups` (`Packing`) -> [S, T], or [B, T] of `rows` [B] alone."""
        attended = self.attn(self.ln_1(x), groups)
        if rows is not None:
            x, attended = x[rows], attended[rows]
        x = x + self.attn.out_proj(attended)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class TextTransformer(nn.Module):
    """The stack of blocks, named as in the released checkpoints."""

    def __init__(self, config: TextConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        self.grad_checkpointing: GradCheckpointing = "none"
        self.resblocks = nn.ModuleList(TextBlock(config, kernel) for _ in range(config.layers))

    def forward(self, x: Tensor, groups: Sequence[tuple[int, int]], rows: Tensor) -> Tensor:
        """x [S, T] of captions in `groups` -> [B, T], the tokens at `rows` [B]."""
        *earlier, last = self.resblocks
        for block in earlier:
            x = run_block(self.grad_checkpointing, block, x, groups)
        # Of the last block's output only the pooled tokens are used.
        return run_block(self.grad_checkpointing, last, x, groups, rows)


class TextTower(nn.Module):
    """Tokenised captions to joint-space features."""

    def __init__(self, config: TextConfig, embed_dim: int, kernel: AttentionKernel) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.zeros(config.context_length, config.width))
        self.transformer = TextTransformer(config, kernel)
        self.ln_final = nn.LayerNorm(config.width)
        self.text_projection = nn.Parameter(torch.empty(config.width, embed_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """Features [B, E] of captions, not normalised; tokens [B, L] as `EvaClip.encode_text`, at
        most the context length (ValueError)."""
        if tokens.shape[1] > self.config.context_length:
            raise ValueError(
                f"captions have {tokens.shape[1]} tokens, the model at most "
                f"{self.config.context_length}"
            )
        if is_traced() or tokens.shape[0] == 0:
            packed = pack_padded(tokens)
        else:
            packed = pack_captions(tokens, self.positional_embedding.device)
        x = F.embedding(packed.tokens, self.token_embedding.weight)
        x = x + F.embedding(packed.positions, self.positional_embedding)
        x = self.transformer(x, packed.groups, packed.ends)
        return linear(self.ln_final(x), self.text_projection.t())


GROUP_COST = {"cpu": 6}
GROUP_COST_ELSEWHERE = 1024
"""Tokens whose computation takes as long as one more group does by itself: a few small calls on a
CPU, launches that a whole batch of short captions would not outlast on an accelerator."""


class Packing(NamedTuple):
    """Places of the tokens of a batch [B, L] in its stream [S]."""

    groups: tuple[tuple[int, int], ...]
    """(captions, tokens of each) in the stream's order; filling tokens last, as captions of one."""
    tokens: Tensor
    """[S] ids."""
    positions: Tensor
    """[S] place of each token in its caption; 0 of filling ones."""
    ends: Tensor
    """[B] place in the stream of each caption's end token, in the batch's order."""


def pack_padded(tokens: Tensor) -> Packing:
    """Pack ids [B, L] as one group of full length: no size depends on them, so it can be traced."""
    captions, length = tokens.shape
    positions = torch.arange(length, device=tokens.device).expand(captions, length).flatten()
    ends = torch.arange(captions, device=tokens.device) * length + tokens.argmax(dim=1)
    return Packing(((captions, length),), tokens.flatten(), positions, ends)


def pack_captions(tokens: Tensor, device: torch.device) -> Packing:
    """Plan the stream of a batch of ids [B, L], whose end token is the highest, on the CPU, and
    send it to `device` without waiting."""
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
    arrays = map(torch.from_numpy, (stream, positions, places))
    return Packing(groups, *(array.to(device, non_blocking=True) for array in arrays))


def filled_length(tokens: int) -> int:
    """The next of 32 lengths between a power of two and its double: at most a 32nd longer."""
    step = max(1, (1 << tokens.bit_length() - 1) // 32)
    return -(-tokens // step) * step


def group_lengths(histogram: np.ndarray, group_cost: int) -> tuple[tuple[int, int], ...]:
    """Cheapest cut of captions, sorted by length, into groups as long as their longest: (captions,
    length) of each, shortest first.

    Args:
        histogram: [longest + 1] captions of each length.
        group_cost: what a group costs beside its tokens, in tokens.
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
