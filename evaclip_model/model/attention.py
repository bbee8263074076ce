"""The attention kernels, and the explicit choice between them.

Covers: what each choice needs, errors when that is missing, which kernel "auto" stands for, and the
kernels, which agree within rounding.
Not here: projections, rotation, and which tokens see each other beyond "causal" (layers.py).

Shapes: B batch, Q queries, S keys, H heads, D channels a head.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from evaclip_model.errors import InputError

AttentionChoice = Literal["auto", "sdpa", "flash2", "flash4", "eager"]
AttentionKernel = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
"""(queries [B, Q, H, D], keys, values [B, S, H, D], causal) -> [B, Q, H, D].

Scores are scaled by D^-0.5; causal needs Q = S."""


@dataclass(frozen=True)
class _Package:
    """A separately installed attention kernel."""

    distribution: str
    module: str
    function: str
    fix: str
    capability: tuple[tuple[int, int], tuple[int, int]]
    """First compute capability it runs on, and the first it does not."""
    widest_head: int
    head_multiple: int


_PACKAGES = {
    "flash2": _Package(
        distribution="flash-attn",
        module="flash_attn",
        function="flash_attn_func",
        fix="pip install 'evaclip[cuda]'",
        capability=((8, 0), (13, 0)),
        widest_head=256,
        head_multiple=8,
    ),
    "flash4": _Package(
        distribution="flash-attn-4",
        module="flash_attn.cute",
        function="flash_attn_func",
        fix="pip install --pre flash-attn-4",
        capability=((8, 0), (13, 0)),
        widest_head=128,
        head_multiple=8,
    ),
}
FLASH_DTYPES = (torch.float16, torch.bfloat16)


def attention_kernel(choice: AttentionChoice, head_widths: Sequence[int] = ()) -> AttentionKernel:
    """The kernel of that name; a choice that is not available never falls back to another.

    Args:
        choice: "auto" takes the faster of "sdpa" and "eager" for each device and dtype; "sdpa" is
            torch's fused attention; "eager" plain matrix products; "flash2" and "flash4" are the
            kernels of the packages flash-attn and flash-attn-4.
        head_widths: D of the towers that will use it.

    Raises:
        InputError: there is no such choice, its package is missing, or this machine's device or a
            head width is not one it works with.
    """
    if choice in _PACKAGES:
        return _flash_kernel(choice, head_widths)
    if choice not in _BUILT_IN:
        known = ", ".join(get_args(AttentionChoice))
        raise InputError(f"attention '{choice}' is unknown: choose one of {known}")
    return _BUILT_IN[choice]


def resolved_attention(
    choice: AttentionChoice, device: torch.device, dtype: torch.dtype
) -> AttentionChoice:
    """The kernel that runs for images on `device` in `dtype`: what "auto" stands for there."""
    if choice != "auto":
        return choice
    # On a CPU the fused backward in bfloat16 is several times slower than plain products.
    return "eager" if device.type == "cpu" and dtype == torch.bfloat16 else "sdpa"


def require_dtype(choice: AttentionChoice, dtype: torch.dtype) -> None:
    """Raises: InputError: the kernel does not compute in `dtype`."""
    if choice in _PACKAGES and dtype not in FLASH_DTYPES:
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
    """The faster of torch's two for this device and dtype, [B, Q, H, D] as `AttentionKernel`; on a
    CPU, captions in bfloat16 go by float32.

    Groups of captions have new sizes in every batch, and oneDNN, which multiplies bfloat16,
    compiles a program for each and keeps a thousand; fused attention in float32 needs none.
    """
    choice = resolved_attention("auto", q.device, q.dtype)
    if causal and choice == "eager":
        return sdpa_attention(q.float(), k.float(), v.float(), causal).to(q.dtype)
    return _BUILT_IN[choice](q, k, v, causal)


_BUILT_IN: dict[str, AttentionKernel] = {
    "auto": auto_attention,
    "sdpa": sdpa_attention,
    "eager": eager_attention,
}


def _flash_kernel(choice: AttentionChoice, head_widths: Sequence[int]) -> AttentionKernel:
    package = _PACKAGES[choice]
    function = _flash_function(choice, package)
    if not torch.cuda.is_available():
        raise InputError(
            f"attention '{choice}' ({package.distribution} {_read_version(package)}) needs a CUDA "
            "device and torch sees none: choose 'auto', 'sdpa' or 'eager'"
        )
    first, beyond = package.capability
    capability = torch.cuda.get_device_capability()
    if not first <= capability < beyond:
        raise InputError(
            f"attention '{choice}' ({package.distribution} {_read_version(package)}) needs a "
            f"GPU of "
            f"compute capability {first[0]}.x to {beyond[0] - 1}.x, this one has "
            f"{capability[0]}.{capability[1]}: choose 'sdpa'"
        )
    for width in head_widths:
        if width > package.widest_head or width % package.head_multiple:
            raise InputError(
                f"attention '{choice}' ({package.distribution} {_read_version(package)}) takes "
                f"head "
                f"widths up to {package.widest_head} in steps of {package.head_multiple}, not the "
                f"model's {width}: choose 'sdpa'"
            )

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


def _flash_function(choice: str, package: _Package) -> Callable[..., Any]:
    # Both packages live in the namespace `flash_attn`: only the function tells them apart.
    try:
        found: Callable[..., Any] = getattr(
            importlib.import_module(package.module), package.function
        )
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"attention '{choice}' needs the package {package.distribution} (version found: "
            f"{_read_version(package)}; {error}): {package.fix}, or choose 'auto', 'sdpa' or "
            f"'eager'"
        ) from None
    return found


def _read_version(package: _Package) -> str:
    try:
        return importlib.metadata.version(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"
