"""The parts both towers are built of: attention, its kernels, and the MLPs.

Covers: the choice of attention kernel; attention as the image and the text tower have it; MLPs.
Not here: how parts make a block or a tower; initial values of weights (clip.py).

Shapes: B batch, S tokens, H heads, D channels a head, W = H * D channels of a tower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaclip_model.errors import InputError
from evaclip_model.rope import rotate

AttentionChoice = Literal["auto", "sdpa", "eager"]
AttentionKernel = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
"""(queries, keys, values [B, S, H, D], causal) -> [B, S, H, D]; scores scaled by D^-0.5."""


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """torch's fused attention: no [S, S] matrix in memory."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out: Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Plain matrix products with the softmax in at least float32."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [B, H, S, S]
    if causal:
        size = scores.shape[-1]
        later = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    wide = torch.promote_types(scores.dtype, torch.float32)
    out: Tensor = scores.softmax(-1, dtype=wide).to(v.dtype) @ v
    return out.transpose(1, 2)


def auto_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The faster kernel of the two for this device and dtype."""
    # On a CPU the fused backward in bfloat16 is several times slower than plain products.
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return eager_attention(q, k, v, causal)
    return sdpa_attention(q, k, v, causal)


_KERNELS: dict[str, AttentionKernel] = {
    "auto": auto_attention,
    "sdpa": sdpa_attention,
    "eager": eager_attention,
}


def attention_kernel(choice: AttentionChoice) -> AttentionKernel:
    """The kernel of that name; a choice that is not available never falls back to another.

    Raises:
        InputError: there is no such kernel here.
    """
    if choice not in _KERNELS:
        known = ", ".join(get_args(AttentionChoice))
        raise InputError(f"attention '{choice}' is not available: choose one of {known}")
    return _KERNELS[choice]


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return x.reshape(*x.shape[:-1], heads, -1)  # [B, S, W] -> [B, S, H, D]


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
            self.qkv = nn.Linear(width, 3 * width, bias=False)
        else:
            self.q_proj = nn.Linear(width, width, bias=False)
            self.k_proj = nn.Linear(width, width, bias=False)
            self.v_proj = nn.Linear(width, width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.inner_attn_ln = nn.LayerNorm(width, eps=1e-6) if sub_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.fused_qkv:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
            q, k, v = F.linear(x, self.qkv.weight, bias).chunk(3, dim=-1)
            return q, k, v
        return (
            F.linear(x, self.q_proj.weight, self.q_bias),
            F.linear(x, self.k_proj.weight),
            F.linear(x, self.v_proj.weight, self.v_bias),
        )

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """x [B, S, W], tables of `GridRope` or none -> [B, S, W]."""
        q, k, v = (_split_heads(part, self.heads) for part in self._project(x))
        if rope is not None:
            q, k = rotate(q, *rope).to(v.dtype), rotate(k, *rope).to(v.dtype)
        out = self.kernel(q, k, v, False).flatten(-2)  # [B, S, W]
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
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, W] -> [B, S, W]; a token sees itself and what is before it."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = (_split_heads(part, self.heads) for part in qkv.chunk(3, dim=-1))
        projected: Tensor = self.out_proj(self.kernel(q, k, v, True).flatten(-2))
        return projected


class GeluMlp(nn.Module):
    """EVA-01's and E's MLP: linear, GELU (erf), linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class SwiGluMlp(nn.Module):
    """EVA-02's MLP: a SiLU-gated product, normed where sub-LN asks for it."""

    def __init__(self, width: int, hidden: int, *, sub_norm: bool) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden)
        self.w2 = nn.Linear(width, hidden)
        self.ffn_ln = nn.LayerNorm(hidden, eps=1e-6) if sub_norm else nn.Identity()
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        out: Tensor = self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))
        return out


class TextMlp(nn.Module):
    """The text tower's MLP: four times its width, exact GELU whatever its weights' source used."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        out: Tensor = self.c_proj(F.gelu(self.c_fc(x)))
        return out
