"""Which patches of an image a masked step looks at (FLIP, section 3).

Covers: a random subset as a pure function of seed and sample position.
Not here: dropping the patches (vision.py takes the indices).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def kept_patches(seed: int, positions: Tensor, num_patches: int, keep_ratio: float) -> Tensor:
    """Uniformly random patches, the same number for every sample.

    The draw depends on nothing but its arguments: not on the batch a sample is in, the rank that
    sees it, or what was drawn before. So a resumed run, and one on other hardware, masks alike.

    Args:
        seed: of the training stage.
        positions: [B] position of each sample in the whole training stream (0 = first sample).
        num_patches: N, without the class token.
        keep_ratio: share to keep, in (0, 1]; at least one patch is kept.

    Returns:
        [B, K] int64 on the CPU, ascending in a row; K = floor(N * keep_ratio).

    Raises:
        ValueError: `keep_ratio` outside (0, 1].
    """
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio must be in (0, 1], got {keep_ratio}")
    # 1 - 0.9 is a little less than 0.1: without the margin a tenth of 100 patches would be 9.
    count = max(1, int(num_patches * keep_ratio + 1e-6))
    sample = _mix(positions.cpu().numpy().astype(np.uint64) + _mix(np.uint64(seed % 2**64)))
    patch = np.arange(1, num_patches + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        rank = _mix(sample[:, None] + patch * _GOLDEN)  # [B, N]; SplitMix64's stream a sample
    kept = np.argsort(rank, axis=1, kind="stable")[:, :count]
    return torch.from_numpy(np.sort(kept, axis=1))


def _mix(x: np.ndarray | np.uint64) -> np.ndarray:
    """SplitMix64's finaliser: neighbouring inputs give unrelated outputs."""
    z = np.atleast_1d(np.asarray(x, dtype=np.uint64)).copy()
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z
