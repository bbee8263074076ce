"""What towers leave out changes no number; stochastic depth and mean pooling are as stated."""

from __future__ import annotations

import pytest
import torch

from evaclip_model.model.layers import DropPath
from tests.evaclip_model.small_models import FAMILIES, small_batch, small_model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_blocks_class_token_alone_is_what_the_whole_block_gives(family):
    model = small_model(family, precision="fp64")
    kept = small_batch()[2]
    block = model.visual.blocks[-1]
    x = torch.randn(6, 9, 64, dtype=torch.float64)
    rope = None if model.visual.rope is None else model.visual.rope(kept)
    results = []
    for first_only in (True, False):
        model.zero_grad()
        out = block(x, rope, first_only)[:, :1]
        (out**2).sum().backward()
        results.append([out.detach(), *(p.grad for p in block.parameters())])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_mean_pooling_norms_the_mean_of_all_tokens_instead_of_each():
    model = small_model(vision={"pooling": "mean"}, precision="fp64")
    tower, (images, _, kept) = model.visual, small_batch()
    assert not [name for name, _ in tower.named_parameters() if name.startswith("norm.")]
    x = tower.embed_patches(images.double(), kept)
    rope = tower.rope(kept)
    for block in tower.blocks:
        x = block(x, rope)
    expected = tower.head(tower.fc_norm(x.mean(dim=1)))
    torch.testing.assert_close(model.encode_image(images, kept=kept), expected)


def test_stochastic_depth_rises_linearly_to_the_last_block():
    model = small_model(vision={"layers": 5, "drop_path": 0.4})
    rates = [block.drop_path.rate for block in model.visual.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    single = small_model(vision={"layers": 1, "drop_path": 0.4})
    assert single.visual.blocks[0].drop_path.rate == 0.0


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    out = DropPath(0.25).train()(torch.ones(4000, 3, 2))
    values, per_sample = out.unique(), out.flatten(1)
    assert values.tolist() == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(per_sample.amin(1), per_sample.amax(1))
    assert float(out.mean()) == pytest.approx(1.0, abs=0.03)


def test_stochastic_depth_is_off_in_evaluation():
    images, _, _ = small_batch()
    dropping, plain = small_model(vision={"drop_path": 0.9}), small_model()
    assert torch.equal(dropping.eval().encode_image(images), plain.encode_image(images))
    torch.manual_seed(0)
    assert not torch.equal(dropping.train().encode_image(images), plain.encode_image(images))
