"""What the model promises beyond equality with the original: masking, precision, cost, seeds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evaclip_model.create import create_model
from evaclip_model.errors import InputError
from evaclip_model.model.clip import EvaClip
from evaclip_model.model.layers import GridRope
from evaclip_model.training.loss.contrastive import contrastive_loss
from evaclip_model.training.training_step import kept_patches

TINY = {
    "embed_dim": 16,
    "vision": {
        "image_px": 16,
        "patch_px": 4,
        "width": 24,
        "layers": 2,
        "heads": 3,
        "mlp_width": 40,
        "mlp": "swiglu",
        "fused_qkv": False,
        "sub_norm": True,
        "norm_placement": "pre",
        "rope_reference_grid": 4,
    },
    "text": {"context_length": 12, "vocab_size": 50, "width": 20, "layers": 2, "heads": 2},
}
BATCH = 5


def tiny_model(**options: object) -> EvaClip:
    model = create_model(TINY, seed=1, **options)  # type: ignore[arg-type]
    with torch.no_grad():  # initial values are so small that differences would hide in rounding
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def tiny_batch() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    images = torch.randn(BATCH, 3, 16, 16, generator=draw)
    tokens = torch.zeros(BATCH, 12, dtype=torch.long)
    for row, length in zip(tokens, (3, 5, 4, 6, 3), strict=True):
        row[:length] = torch.randint(1, 48, (length,), generator=draw)
        row[0], row[length] = 48, 49
    return images, tokens


def test_forward_returns_unit_features_and_the_inverse_temperature():
    image, text, scale = create_model(TINY, seed=0)(*tiny_batch())
    assert image.shape == text.shape == (BATCH, 16)
    torch.testing.assert_close(image.norm(dim=1), torch.ones(BATCH))
    torch.testing.assert_close(text.norm(dim=1), torch.ones(BATCH))
    assert scale.shape == ()
    assert float(scale.detach()) == pytest.approx(1 / 0.07)


def test_keeping_all_patches_in_any_order_changes_nothing():
    model, (images, _) = tiny_model().double(), tiny_batch()
    shuffled = torch.stack([torch.randperm(16) for _ in range(BATCH)])
    torch.testing.assert_close(
        model.encode_image(images.double(), kept=shuffled), model.encode_image(images.double())
    )


def test_a_masked_image_gives_what_its_kept_tokens_alone_give():
    model, (images, _) = tiny_model().double(), tiny_batch()
    tower, kept = model.visual, kept_patches(0, torch.arange(BATCH), 16, 0.5)
    assert tower.rope is not None
    cos, sin = tower.rope(None)
    for image, patches, got in zip(
        images.double(), kept, model.encode_image(images.double(), kept=kept), strict=True
    ):
        tokens = torch.cat((torch.tensor([0]), patches + 1))
        x = tower.embed_patches(image[None], None)[:, tokens]
        for block in tower.blocks:
            x = block(x, (cos[tokens], sin[tokens]))
        torch.testing.assert_close(got, tower.head(tower.norm(x[:, 0]))[0])


def test_content_of_dropped_patches_has_no_influence():
    model, (images, _) = tiny_model(), tiny_batch()
    kept = torch.zeros(BATCH, 1, dtype=torch.long)  # the top left patch
    other = images.clone()
    other[:, :, 4:, 4:] += 1
    assert torch.equal(model.encode_image(images, kept=kept), model.encode_image(other, kept=kept))


def test_what_follows_the_first_end_token_has_no_influence():
    model, (_, tokens) = tiny_model(), tiny_batch()
    features = model.encode_text(tokens)
    torch.testing.assert_close(model.encode_text(tokens[:, :7]), features, rtol=0, atol=1e-6)
    noisy = tokens.clone()
    noisy[0, 5:] = 49
    torch.testing.assert_close(model.encode_text(noisy), features, rtol=0, atol=1e-6)


def test_both_attention_kernels_agree():
    images, tokens = tiny_batch()
    one, other = (tiny_model(attention=choice)(images, tokens) for choice in ("sdpa", "eager"))
    for got, expected in zip(one, other, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_a_kernel_that_is_not_there_is_an_error_and_never_replaced():
    with pytest.raises(InputError, match="needs the package flash-attn"):
        create_model(TINY, attention="flash2")  # type: ignore[arg-type]


def test_gradient_checkpointing_gives_the_same_gradients():
    images, tokens = tiny_batch()
    kept = kept_patches(0, torch.arange(BATCH), 16, 0.5)
    gradients = []
    for enabled in ("none", "full"):
        model = tiny_model()
        model.set_grad_checkpointing(enabled)
        contrastive_loss(*model(images, tokens, kept)).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_half_precision_keeps_tables_features_and_temperature_wide():
    images, tokens = tiny_batch()
    full, half = tiny_model()(images, tokens), tiny_model().bfloat16()
    assert half.visual.rope is not None
    assert half.visual.rope.cos.dtype == torch.float32
    for got, expected in zip(half(images, tokens), full, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.05)


def test_rope_tables_survive_the_meta_device():
    with torch.device("meta"):
        empty = GridRope(4, 8, reference_grid=4)
    assert torch.equal(empty.to_empty(device="cpu").cos, GridRope(4, 8, reference_grid=4).cos)


def test_a_seed_decides_the_weights_and_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one, other, third = (create_model(TINY, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not torch.equal(one["visual.head.weight"], third["visual.head.weight"])


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\[3, 20, 20\].*\[3, 16, 16\]"):
        create_model(TINY).encode_image(torch.zeros(1, 3, 20, 20))
