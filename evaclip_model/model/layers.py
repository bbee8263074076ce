"""The parts both towers are built of: attention modules and MLPs.

Covers: attention as the image and the text tower have it; MLPs; stochastic depth.
Not here: attention kernels (attention.py); how parts make a block or a tower; initial values of
weights (clip.py).

Shapes: B batch, S tokens, H heads, D channels a head, W = H * D channels of a tower.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaclip_model.cpu.linear import Linear, linear
from evaclip_model.model.attention import AttentionKernel
from evaclip_model.model.rope import rotate_pairs


class VisionAttention(nn.Module):
    """Self-attention of the image tower: biases on queries and values, none on keys."""

    def __init__(
        self, width: int, heads: int, *, fused_qkv: bool, sub_norm: bool, kernel: AttentionKernel
    ) -> None:
        super().__init__()
        self.heads = heads
        self.kernel = kernel
        self.fused_qkv = fused_qkv
        if fused_qkv:
            self.qkv = Linear(width, 3 * width, bias=False)
        else:
            self.q_proj = Linear(width, width, bias=False)
            self.k_proj = Linear(width, width, bias=False)
            self.v_proj = Linear(width, width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.inner_attn_ln = nn.LayerNorm(width, eps=1e-6) if sub_norm else nn.Identity()
        self.proj = Linear(width, width)

    def _project_qkv(self, x: Tensor, first_only: bool) -> tuple[Tensor, Tensor, Tensor]:
        if self.fused_qkv and not first_only:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
            q, k, v = linear(x, self.qkv.weight, bias).chunk(3, dim=-1)
            return q, k, v
        q_weight, k_weight, v_weight = (
            self.qkv.weight.chunk(3)
            if self.fused_qkv
            else (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        )
        return (
            linear(x[:, :1] if first_only else x, q_weight, self.q_bias),
            linear(x, k_weight),
            linear(x, v_weight, self.v_bias),
        )

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, first_only: bool = False
    ) -> Tensor:
        """Attention of all tokens, or of the class token alone, to all tokens.

        Args:
            x: [B, S, W].
            rope: tables of `GridRope`, or none.
            first_only: queries are those of token 0, which is never rotated.

        Returns:
            [B, S, W], or [B, 1, W].
        """
        q, k, v = (
            part.reshape(*part.shape[:-1], self.heads, -1)  # [B, S, H, D]
            for part in self._project_qkv(x, first_only)
        )
        if rope is not None:
            q, k = q if first_only else rotate_pairs(q, *rope), rotate_pairs(k, *rope)
        out = self.kernel(q, k, v, False).flatten(-2)  # [B, S or 1, W]
        projected: Tensor = self.proj(self.inner_attn_ln(out))
        return projected


class TextAttention(nn.Module):
    """Causal self-attention of the text tower, with CLIP's parameter names."""

    def __init__(self, width: int, heads: int, *, kernel: AttentionKernel) -> None:
        super().__init__()
        self.heads = heads
        self.kernel = kernel
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)

    def forward(self, x: Tensor, groups: Sequence[tuple[int, int]]) -> Tensor:
        """Attention inside each caption, before the last projection.

        Args:
            x: [S, W] tokens of all captions, one caption behind the other.
            groups: (captions, tokens of each) of each run of captions of equal length.

        Returns:
            [S, W]; a token has seen itself and what is before it in its caption.
        """
        qkv = linear(x, self.in_proj_weight, self.in_proj_bias)
        width = x.shape[-1]
        attended = []
        rows = [captions * tokens for captions, tokens in groups]
        for (captions, tokens), part in zip(groups, torch.split(qkv, rows), strict=True):
            heads = part.reshape(captions, tokens, 3, self.heads, width // self.heads)
            q, k, v = heads.unbind(2)
            out = self.kernel(q, k, v, True)  # [captions, tokens, H, D]
            attended.append(out.reshape(captions * tokens, width))
        return torch.cat(attended)


class GeluMlp(nn.Module):
    """EVA-01's and E's MLP: linear, GELU (erf), linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class SwiGluMlp(nn.Module):
    """EVA-02's MLP: a SiLU-gated product, normed where sub-LN asks for it."""

    def __init__(self, width: int, hidden: int, *, sub_norm: bool) -> None:
        super().__init__()
        self.w1 = Linear(width, hidden)
        self.w2 = Linear(width, hidden)
        self.ffn_ln = nn.LayerNorm(hidden, eps=1e-6) if sub_norm else nn.Identity()
        self.w3 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        out: Tensor = self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))
        return out


class TextMlp(nn.Module):
    """The text tower's MLP: four times its width, exact GELU whatever its weights' source used."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = Linear(width, 4 * width)
        self.c_proj = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        out: Tensor = self.c_proj(F.gelu(self.c_fc(x)))
        return out


class DropPath(nn.Module):
    """Stochastic depth: in training, leaves the branch of a random share of samples out."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor, kept: Tensor | None = None) -> Tensor:
        """[B, S, W] -> [B, S, W]; what is kept is scaled up, so that its mean stays.

        Args:
            kept: [B] which samples keep the branch (`step.kept_branches`); none draws them from
                torch's generator.
        """
        if not self.training or self.rate == 0:
            return branch
        if kept is None:
            kept = branch.new_empty(len(branch)).bernoulli_(1 - self.rate)
        return branch * (kept.to(branch.dtype) / (1 - self.rate))[:, None, None]


def drop_path_rates(last: float, blocks: int) -> list[float]:
    """Chance of skipping a branch of each block: from 0 at the first in a line to `last`."""
    return [last * depth / max(1, blocks - 1) for depth in range(blocks)]
