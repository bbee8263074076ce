"""What of the image tower a sample passes in training: its patches, and the branches of its blocks.

Covers: how much is masked at a step (FLIP, section 3); random subsets of patches and of branches
(stochastic depth) as pure functions of seed and sample position.
Not here: dropping them (model/vision.py takes indices and flags).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from evaclip_model.training.config import TrainConfig

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_BRANCHES = np.uint64(0x6272616E63686573)
"""Sets the draws of branches apart from those of patches."""


def patch_dropout_at(config: TrainConfig, step: int) -> float:
    """Share of patches masked out at optimizer step `step`, counted from 0.

    A line from `patch_dropout` at the first step to `patch_dropout_end` at the last masked one; 0
    in the last `unmasked_final_share` of the steps.
    """
    masked = config.steps - round(config.steps * config.unmasked_final_share)
    if step >= masked:
        return 0.0
    first, end = config.patch_dropout, config.patch_dropout_end
    if end is None or masked == 1:
        return first
    return first + (end - first) * step / (masked - 1)


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


def kept_branches(seed: int, positions: Tensor, rates: Sequence[float]) -> Tensor:
    """Which branches of which blocks each sample passes, drawn from nothing but the arguments.

    Args:
        seed: of the training stage.
        positions: [B] position of each sample in the whole training stream.
        rates: chance of each block that a sample skips one of its branches.

    Returns:
        [B, blocks, 2] bool on the CPU; attention first, then the MLP, each drawn for itself.
    """
    sample = _mix(positions.cpu().numpy().astype(np.uint64) + _mix(np.uint64(seed % 2**64)))
    branch = np.arange(1, 2 * len(rates) + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        drawn = _mix(_mix(sample + _BRANCHES)[:, None] + branch * _GOLDEN)
    uniform = (drawn >> np.uint64(11)) * 2.0**-53  # [B, 2 * blocks] in [0, 1)
    kept = uniform >= np.repeat(np.asarray(rates, dtype=np.float64), 2)
    return torch.from_numpy(kept.reshape(len(positions), len(rates), 2))


def _mix(x: np.ndarray | np.uint64) -> np.ndarray:
    """SplitMix64's finaliser: neighbouring inputs give unrelated outputs."""
    z = np.atleast_1d(np.asarray(x, dtype=np.uint64)).copy()
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z
