"""Masks are a pure function of seed and position."""

from __future__ import annotations

import pytest
import torch

from evaclip_model.training.masking import kept_patches

PINNED = [[1, 2, 3, 6], [0, 5, 6, 8], [0, 5, 12, 14]]


def test_a_mask_depends_on_seed_and_position_alone():
    together = kept_patches(3, torch.arange(100, 120), 36, 0.5)
    alone = torch.cat([kept_patches(3, torch.tensor([p]), 36, 0.5) for p in range(100, 120)])
    assert torch.equal(together, alone)
    assert not torch.equal(together, kept_patches(4, torch.arange(100, 120), 36, 0.5))


def test_masks_never_change_between_versions_because_runs_are_resumed():
    assert kept_patches(42, torch.tensor([0, 1, 10**12]), 16, 0.25).tolist() == PINNED


def test_every_row_keeps_different_patches_in_ascending_order():
    kept = kept_patches(0, torch.arange(500), 49, 0.3)
    assert kept.shape == (500, 14)
    assert bool((kept.diff(dim=1) > 0).all())
    assert 0 <= int(kept.min()) <= int(kept.max()) < 49


def test_every_patch_and_every_pair_is_kept_equally_often():
    kept = kept_patches(0, torch.arange(20_000), 16, 0.5)
    chosen = torch.zeros(20_000, 16).scatter_(1, kept, 1)
    torch.testing.assert_close(chosen.mean(0), torch.full((16,), 0.5), rtol=0, atol=0.02)
    pairs = (chosen.T @ chosen / 20_000)[~torch.eye(16, dtype=torch.bool)]
    torch.testing.assert_close(pairs, torch.full_like(pairs, 7 / 30), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("patches", "ratio", "count"), [(36, 0.5, 18), (49, 0.5, 24), (100, 1 - 0.9, 10), (4, 0.1, 1)]
)
def test_the_number_kept_is_the_floor_of_the_share_and_at_least_one(patches, ratio, count):
    assert kept_patches(0, torch.arange(2), patches, ratio).shape == (2, count)


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.5])
def test_an_impossible_share_is_refused(ratio: float):
    with pytest.raises(ValueError, match="keep_ratio"):
        kept_patches(0, torch.arange(2), 16, ratio)
