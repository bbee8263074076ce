"""Masks and branches are a pure function of seed and position, their amount of the step."""

from __future__ import annotations

import pytest
import torch

from evaclip_model.model.layers import drop_path_rates
from evaclip_model.training.config import TrainConfig
from evaclip_model.training.training_step import kept_branches, kept_patches, patch_dropout_at
from tests.evaclip_model.small_models import small_batch, small_model

PINNED = [[1, 2, 3, 6], [0, 5, 6, 8], [0, 5, 12, 14]]
PINNED_BRANCHES = [
    [[1, 1], [0, 0], [1, 0], [1, 0], [0, 1], [0, 0]],
    [[0, 1], [1, 1], [0, 1], [0, 0], [0, 0], [1, 1]],
]


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


def config(**changes) -> TrainConfig:
    return TrainConfig(name="x", image_px=4, samples_seen=160, global_batch=16, **changes)


def shares(**changes) -> list[float]:
    return [patch_dropout_at(config(**changes), step) for step in range(10)]


def test_masking_stays_unless_an_end_is_given():
    assert shares(patch_dropout=0.5) == [0.5] * 10


def test_masking_goes_in_a_line_to_its_end_at_the_last_masked_step():
    line = shares(patch_dropout=0.9, patch_dropout_end=0.0)
    assert line == pytest.approx([0.9 - 0.1 * step for step in range(10)])
    short = shares(patch_dropout=0.5, patch_dropout_end=0.3, unmasked_final_share=0.5)
    assert short == pytest.approx([0.5, 0.45, 0.4, 0.35, 0.3, 0, 0, 0, 0, 0])


@pytest.mark.parametrize(("share", "whole"), [(0.0, 0), (0.1, 1), (0.26, 3), (1.0, 10)])
def test_the_last_part_of_the_steps_sees_whole_images(share, whole):
    seen = shares(patch_dropout=0.5, unmasked_final_share=share)
    assert seen == [0.5] * (10 - whole) + [0.0] * whole
    if whole < 10:  # one masked step has a first share, and no line
        assert shares(patch_dropout=0.5, patch_dropout_end=0.2, unmasked_final_share=0.9)[0] == 0.5


def test_branches_depend_on_seed_and_position_alone():
    rates = [0.0, 0.3, 0.6]
    together = kept_branches(3, torch.arange(50, 70), rates)
    alone = torch.cat([kept_branches(3, torch.tensor([p]), rates) for p in range(50, 70)])
    assert torch.equal(together, alone)
    assert not torch.equal(together, kept_branches(4, torch.arange(50, 70), rates))


def test_branches_never_change_between_versions_because_runs_are_resumed():
    assert kept_branches(42, torch.tensor([0, 10**12]), [0.5] * 6).int().tolist() == PINNED_BRANCHES


def test_each_branch_is_kept_as_often_as_its_blocks_rate_says_and_for_itself():
    kept = kept_branches(0, torch.arange(20_000), [0.0, 0.2, 0.9]).float()
    assert bool(kept[:, 0].all())
    expected = torch.tensor([[0.8, 0.8], [0.1, 0.1]])
    torch.testing.assert_close(kept[:, 1:].mean(0), expected, rtol=0, atol=0.015)
    drawn = torch.cat((kept[:, 1:].flatten(1), masked_first_patch()[:, None]), 1)
    correlated = torch.corrcoef(drawn.T) - torch.eye(5)
    assert float(correlated.abs().max()) < 0.03


def masked_first_patch() -> torch.Tensor:
    """[20000] 1 where the first of 16 patches is kept, of the samples of the branches."""
    return (kept_patches(0, torch.arange(20_000), 16, 0.5)[:, 0] == 0).float()


@pytest.mark.parametrize("family", ["EVA-01", "EVA-02-E"])
def test_a_sample_passes_just_the_branches_it_is_told_to(family):
    images, _, kept = small_batch(4)
    model = small_model(family, precision="fp64").train()
    images = images.double()
    model.set_drop_path(0.5)
    assert [block.drop_path.rate for block in model.visual.blocks] == drop_path_rates(0.5, 3)
    branches = kept_branches(1, torch.arange(4), [0.0, 0.25, 0.5])
    got = model.encode_image(images, kept=kept, branches=branches)
    for sample, passed in enumerate(branches):
        alone = small_model(family, precision="fp64")  # evaluated: nothing is left to chance
        for block, rate, through in zip(
            alone.visual.blocks, (0.0, 0.25, 0.5), passed.tolist(), strict=True
        ):
            ends = (
                ((block.gamma_1,), (block.gamma_2,))
                if block.has_layer_scale
                else (block.norm1.parameters(), block.norm2.parameters())
            )
            for end, kept_branch in zip(ends, through, strict=True):
                for parameter in end:
                    parameter.data.mul_(kept_branch / (1 - rate))
        own = slice(sample, sample + 1)
        expected = alone.eval().encode_image(images[own], kept=kept[own])
        torch.testing.assert_close(got[own], expected, rtol=1e-9, atol=1e-12)
