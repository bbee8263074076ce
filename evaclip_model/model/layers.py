"""The parts both towers are built of: rotary positions (EVA-02, section 2.1), attention and its
kernels, MLPs, stochastic depth, gradient checkpointing.

Not here: how parts make a block or a tower (clip.py).

Shapes: B batch, S tokens or keys, Q queries, H heads, D channels a head, W = H * D channels of a
tower.
"""

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint as saving

from evaclip_model.choices import GradCheckpointing, Precision
from evaclip_model.cpu.linear import Linear, is_traced, linear
from evaclip_model.errors import InputError
from evaclip_model.model.model_config import VisionConfig

AttentionChoice = Literal["auto", "sdpa", "flash2", "flash4", "eager"]
AttentionKernel = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
"""(queries [B, Q, H, D], keys, values [B, S, H, D], causal) -> [B, Q, H, D]; scores are scaled by
D^-0.5, causal needs Q = S."""


class _Package(NamedTuple):
    """A separately installed attention kernel, whose function is `flash_attn_func`."""

    distribution: str
    module: str
    fix: str
    widest_head: int


_PACKAGES = {
    "flash2": _Package("flash-attn", "flash_attn", "pip install 'evaclip[cuda]'", 256),
    "flash4": _Package("flash-attn-4", "flash_attn.cute", "pip install --pre flash-attn-4", 128),
}
DTYPES: Mapping[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def attention_kernel(choice: AttentionChoice, head_widths: Sequence[int] = ()) -> AttentionKernel:
    """The kernel of that name, for towers with `head_widths` D; never falls back to another.

    "auto" takes the faster of "sdpa" (torch's fused attention) and "eager" (plain matrix products)
    for each device and dtype; "flash2" and "flash4" are the packages flash-attn and flash-attn-4.
    Raises InputError: an unknown choice, a missing package, another device or head width.
    """
    if choice in _PACKAGES:
        return _flash_kernel(choice, head_widths)
    if choice not in _KERNELS:
        known = ", ".join(get_args(AttentionChoice))
        raise InputError(f"attention '{choice}' is unknown: choose one of {known}")
    return _KERNELS[choice]


def resolved_attention(
    choice: AttentionChoice, device: torch.device, dtype: torch.dtype
) -> AttentionChoice:
    """The kernel that runs for images on `device` in `dtype`: what "auto" stands for there."""
    if choice != "auto":
        return choice
    # On a CPU the fused backward in bfloat16 is several times slower than plain products.
    return "eager" if device.type == "cpu" and dtype == torch.bfloat16 else "sdpa"


def require_dtype(choice: AttentionChoice, dtype: torch.dtype) -> None:
    """Raises InputError: the kernel does not compute in `dtype`."""
    if choice in _PACKAGES and dtype not in (torch.float16, torch.bfloat16):
        package = _PACKAGES[choice].distribution
        raise InputError(
            f"attention '{choice}' ({package}) computes in float16 and bfloat16 only, not in "
            f"{str(dtype).removeprefix('torch.')}: make the model with precision 'bf16' or 'fp16', "
            "or choose 'sdpa'"
        )


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """torch's fused attention, [B, Q, H, D] as `AttentionKernel`: no [Q, S] matrix in memory."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out: Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Plain matrix products, [B, Q, H, D] as `AttentionKernel`; the softmax sums in float32."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [B, H, Q, S]
    if causal:
        size = scores.shape[-1]
        later = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    out: Tensor = scores.softmax(-1) @ v
    return out.transpose(1, 2)


def auto_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The faster of torch's two for this device and dtype, [B, Q, H, D] as `AttentionKernel`. On a
    CPU, captions in bfloat16 go by float32: groups of them have new sizes in every batch, and
    oneDNN, which multiplies bfloat16, compiles a program for each."""
    choice = resolved_attention("auto", q.device, q.dtype)
    if causal and choice == "eager":
        return sdpa_attention(q.float(), k.float(), v.float(), causal).to(q.dtype)
    return _KERNELS[choice](q, k, v, causal)


_KERNELS = {"auto": auto_attention, "sdpa": sdpa_attention, "eager": eager_attention}


def _flash_kernel(choice: AttentionChoice, head_widths: Sequence[int]) -> AttentionKernel:
    package = _PACKAGES[choice]
    try:
        version = importlib.metadata.version(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    # Both packages live in the namespace `flash_attn`: only the function tells them apart.
    try:
        function: Callable[..., Any] = importlib.import_module(package.module).flash_attn_func
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"attention '{choice}' needs the package {package.distribution} (version found: "
            f"{version}; {error}): {package.fix}, or choose 'auto', 'sdpa' or 'eager'"
        ) from None
    refusal = None
    wrong = [width for width in head_widths if width > package.widest_head or width % 8]
    has_gpu = torch.cuda.is_available()
    major, minor = torch.cuda.get_device_capability() if has_gpu else (0, 0)
    if not has_gpu:
        refusal = "needs a CUDA device and torch sees none"
    elif not 8 <= major <= 12:
        refusal = f"needs a GPU of compute capability 8.x to 12.x, this one has {major}.{minor}"
    elif wrong:
        most = package.widest_head
        refusal = f"takes head widths up to {most} in steps of 8, not the model's {wrong[0]}"
    if refusal:
        name = f"{package.distribution} {version}"
        raise InputError(f"attention '{choice}' ({name}) {refusal}: choose 'sdpa' or 'eager'")

    def kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        require_dtype(choice, q.dtype)
        if q.device.type != "cuda":
            raise InputError(
                f"attention '{choice}' runs on CUDA devices only and the model is on "
                f"{q.device.type}: move it with .to('cuda'), or choose 'auto'"
            )
        out = function(q, k, v, causal=causal)
        # flash-attn-4 gives back the log-sum-exp as well.
        attended: Tensor = out[0] if isinstance(out, tuple) else out
        return attended

    return kernel


BASE = 10_000.0
"""Ratio between the slowest and the fastest frequency of an axis."""


def rope_angles(grid: int, head_width: int, reference_grid: int) -> Tensor:
    """Angles of the channel pairs of one head, for the class token (row 0, zero) and every patch:
    [1 + grid * grid, head_width / 2] radians, float32.

    The first half of a head's pairs turns with the patch's row, the second half with its column.
    Positions are scaled to `reference_grid`, so that a finer grid covers the same range.
    """
    half = head_width // 2  # channels an axis
    pairs = half // 2  # pairs an axis
    frequencies = 1 / BASE ** (torch.arange(0, half, 2, dtype=torch.float32) / half)  # [pairs]
    positions = torch.arange(grid, dtype=torch.float32) / grid * reference_grid
    axis = torch.outer(positions, frequencies)  # [grid, pairs]
    rows = axis[:, None, :].expand(grid, grid, pairs)
    columns = axis[None, :, :].expand(grid, grid, pairs)
    patches = torch.cat((rows, columns), dim=-1).reshape(grid * grid, 2 * pairs)
    return torch.cat((torch.zeros(1, 2 * pairs), patches))


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of ADJACENT channels (2j, 2j+1) of x [B, S, H, D] by its angle, given as cos
    and sin [S, 1, D/2] or [B, S, 1, D/2]; in the wider of the two dtypes, the result in x's."""
    wide = torch.promote_types(x.dtype, cos.dtype)
    pairs = x.to(wide).reshape(*x.shape[:-1], -1, 2)  # [B, S, H, D/2, 2]
    cos, sin = cos.to(wide), sin.to(wide)
    if torch.compiler.is_compiling() or is_traced():  # neither knows complex numbers
        first, second = pairs.unbind(-1)
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
    else:  # one pass over memory in place of eight
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return turned.flatten(-2).to(x.dtype)


class GridRope(nn.Module):
    """Cosines and sines of a grid, kept in float32 whatever the model is cast to; neither saved nor
    loaded: tables in published checkpoints have several shapes."""

    cos: Tensor
    sin: Tensor

    def __init__(self, grid: int, head_width: int, reference_grid: int) -> None:
        super().__init__()
        self.geometry = (grid, head_width, reference_grid)
        self.register_buffer("cos", torch.empty(0), persistent=False)
        self.register_buffer("sin", torch.empty(0), persistent=False)
        self._fill_tables(torch.get_default_device())

    def _fill_tables(self, device: torch.device) -> None:
        with torch.device("cpu"):
            angles = rope_angles(*self.geometry)
        self.cos = angles.cos()[:, None, :].to(device)  # [1 + N, 1, D/2]
        self.sin = angles.sin()[:, None, :].to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Every cast and move of a module comes through here; a cast to bfloat16 would leave
        # neighbouring patches with the same angle, and leaving the meta device would leave noise.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._fill_tables(self.cos.device)
        return self

    def forward(self, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """cos and sin [1 + N, 1, D/2] of all tokens, or [B, 1 + K, 1, D/2] of the class token and
        the patches `kept` [B, K]."""
        if kept is None:
            return self.cos, self.sin
        tokens = torch.nn.functional.pad(kept + 1, (1, 0))  # the class token is row 0
        return self.cos[tokens], self.sin[tokens]


class VisionAttention(nn.Module):
    """Self-attention of the image tower: biases on queries and values, none on keys."""

    def __init__(self, config: VisionConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        self.kernel = kernel
        self.fused_qkv = config.fused_qkv
        if config.fused_qkv:
            self.qkv = Linear(width, 3 * width, bias=False)
        else:
            self.q_proj = Linear(width, width, bias=False)
            self.k_proj = Linear(width, width, bias=False)
            self.v_proj = Linear(width, width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.inner_attn_ln = nn.LayerNorm(width, eps=1e-6) if config.sub_norm else nn.Identity()
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
        """Attention of all tokens x [B, S, W] to all, `rope` as `GridRope` gives it, -> [B, S, W];
        or with `first_only` of the class token alone, which is never rotated, -> [B, 1, W]."""
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
        """Attention inside each caption, before the last projection: x [S, W], tokens of one
        caption behind the other, in `groups`, (captions, tokens of each), -> [S, W]."""
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
        """[B, S, W] -> [B, S, W], scaled up, so that the mean stays. `kept` [B] says which samples
        keep the branch (`training_step.kept_branches`); none draws them from torch's generator."""
        if not self.training or self.rate == 0:
            return branch
        if kept is None:
            kept = branch.new_empty(len(branch)).bernoulli_(1 - self.rate)
        return branch * (kept.to(branch.dtype) / (1 - self.rate))[:, None, None]


def drop_path_rates(last: float, blocks: int) -> list[float]:
    """Chance of skipping a branch of each block: from 0 at the first in a line to `last`."""
    return [last * depth / max(1, blocks - 1) for depth in range(blocks)]


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
"""Matrix products and fused attention, but not eager attention's products: cheap and long."""


def run_block(mode: GradCheckpointing, block: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """The output of `block(*inputs)`, [B, S, W] of an image block or [S, W] of a text block; in the
    backward pass it is computed again, with the same random numbers: all of it in mode "full", all
    but matrix products and fused attention in "selective", nothing in "none"."""
    if mode == "none" or not torch.is_grad_enabled():
        return block(*inputs)
    options: dict[str, Any] = {}
    if mode == "selective":
        options["context_fn"] = partial(saving.create_selective_checkpoint_contexts, _choose_policy)
    out: Tensor = saving.checkpoint(block, *inputs, use_reentrant=False, **options)
    return out


def _choose_policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> saving.CheckpointPolicy:
    keep = op.name().split(".")[0] in _KEPT
    return saving.CheckpointPolicy.MUST_SAVE if keep else saving.CheckpointPolicy.PREFER_RECOMPUTE


def to_float32(x: Tensor) -> Tensor:
    """[...] in at least float32: float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
