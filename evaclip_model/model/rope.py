"""Rotary position embedding on a square grid of patches (EVA-02, section 2.1).

Covers: the angles of every patch, and rotating queries and keys by them.
Not here: attention; absolute position embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from evaclip_model.cpu.linear import is_traced

BASE = 10_000.0
"""Ratio between the slowest and the fastest frequency of an axis, as in the language original."""


def rope_angles(grid: int, head_width: int, reference_grid: int) -> Tensor:
    """Angles of the channel pairs of one head, for the class token and every patch.

    The first half of a head's pairs turns with the patch's row, the second half with its column.
    Positions are scaled to `reference_grid`, so that a finer grid covers the same range.

    Returns:
        [1 + grid * grid, head_width / 2] radians, float32; row 0 (the class token) is zero.
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
    """Turn each pair of ADJACENT channels (2j, 2j+1) by its angle.

    Args:
        x: [B, S, H, D] queries or keys.
        cos, sin: [S, 1, D/2] or [B, S, 1, D/2].

    Returns:
        [B, S, H, D] in the dtype of `x`; the rotation is in the wider of the two dtypes.
    """
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
    """Cosines and sines of a grid, kept in float32 whatever the model is cast to.

    They follow from the geometry alone, so they are neither saved nor loaded: tables in published
    checkpoints have several shapes and are always recomputed.
    """

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
        """Tables of all tokens, or of the class token and the kept patches.

        Args:
            kept: [B, K] patch indices, or none for all patches.

        Returns:
            cos, sin: [1 + N, 1, D/2], or [B, 1 + K, 1, D/2].
        """
        if kept is None:
            return self.cos, self.sin
        tokens = torch.nn.functional.pad(kept + 1, (1, 0))  # the class token is row 0
        return self.cos[tokens], self.sin[tokens]

    def extra_repr(self) -> str:
        return "grid={}, head_width={}, reference_grid={}".format(*self.geometry)
