"""The model against numbers made by the authors' own code (data/README.md)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from evaclip_model.create import create_model
from evaclip_model.model.clip import EvaClip
from evaclip_model.model.layers import GridRope, rotate_pairs
from evaclip_model.model.model_config import ModelConfig, list_models, shipped_name
from evaclip_model.training.loss.contrastive import contrastive_loss
from evaclip_model.weights.load import resize_bicubic, resize_positions

DATA = Path(__file__).parent / "data" / "models"
RELEASED = json.loads(gzip.decompress((DATA / "released_keys.json.gz").read_bytes()))
CASES = ["eva01_g", "eva02_l"]


def reference(case: str) -> tuple[EvaClip, dict[str, Tensor], dict[str, float]]:
    described = json.loads((DATA / f"{case}.json").read_text())
    model = create_model(described["config"], weights=DATA / f"{case}_weights.safetensors")
    return model, load_file(DATA / f"{case}_expected.safetensors"), described["grad_norms"]


def recorded_blocks(model: EvaClip) -> dict[str, Tensor]:
    """Filled with the image tower's blocks' outputs whenever the model is called."""
    found: dict[str, Tensor] = {}
    for index, block in enumerate(model.visual.blocks):
        name = f"visual.block_{index}"
        block.register_forward_hook(lambda _, __, out, name=name: found.update({name: out}))
    return found


def assert_same_tokens(got: Tensor, expected: Tensor) -> None:
    """The last block may give the class token alone, which is all that follows needs."""
    torch.testing.assert_close(got, expected[:, : got.shape[1]], rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 2e-5), ("fp64", 1e-12)])
def test_features_logits_and_loss_equal_the_originals(case: str, dtype: str, tolerance: float):
    model, expected, _ = reference(case)
    wide = torch.float64 if dtype == "fp64" else torch.float32
    model = model.to(wide)
    images, tokens = expected["inputs/images"].to(wide), expected["inputs/token_ids"]
    with torch.no_grad():
        image, text, scale = model(images, tokens)
        got = {
            "image_features": model.encode_image(images),
            "text_features": model.encode_text(tokens),
            "image_features_normalized": image,
            "text_features_normalized": text,
            "logit_scale_exp": scale,
            "logits_per_image": scale * image @ text.T,
            "loss": contrastive_loss(image, text, scale),
        }
    compared = 0
    for name, value in got.items():
        if f"{dtype}/{name}" in expected:
            compared += 1
            torch.testing.assert_close(
                value, expected[f"{dtype}/{name}"], rtol=0, atol=tolerance, msg=name
            )
    assert compared >= 4


@pytest.mark.parametrize("case", CASES)
def test_every_block_equals_the_original(case: str):
    model, expected, _ = reference(case)
    found = recorded_blocks(model)
    with torch.no_grad():
        model.encode_image(expected["inputs/images"])
    blocks = load_file(DATA / f"{case}_activations.safetensors")
    assert found.keys() == blocks.keys()
    for name, tokens in found.items():
        assert_same_tokens(tokens, blocks[name])


@pytest.mark.parametrize("case", CASES)
def test_every_gradient_equals_the_original(case: str):
    """By its norm in double precision, and by two inner products of the single-precision one."""
    model, expected, norms = reference(case)
    probes = json.loads((DATA / f"{case}_gradient_probes.json").read_text())
    model.double()
    images, tokens = expected["inputs/images"].double(), expected["inputs/token_ids"]
    contrastive_loss(*model(images, tokens)).backward()
    found = {name: p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == norms.keys() == probes.keys()
    for name, gradient in found.items():
        norm = norms[name]
        assert float(gradient.norm()) == pytest.approx(norm, rel=1e-9, abs=1e-12), name
        for number, product in enumerate(probes[name], start=1):
            probe = (torch.arange(len(gradient), dtype=torch.float64) * number * 2**0.5).cos()
            # Rounding of single precision, which a tenth of a per mille of the norm is far above.
            assert float(gradient @ probe) == pytest.approx(product, abs=1e-4 * norm), name


def test_the_first_and_the_last_part_of_an_e_style_tower_equal_the_original():
    first = load_file(DATA / "eva02_e_first_block.safetensors")
    last = load_file(DATA / "eva02_e_last_part.safetensors")
    model = create_model(json.loads((DATA / "eva02_e.json").read_text())["config"], seed=0)
    weights = {
        key.removeprefix("weights/"): value
        for key, value in (first | last).items()
        if key.startswith("weights/")
    }
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    found = recorded_blocks(model)
    tokens = last["visual.tokens_before_final_norm"]
    model.visual.blocks[-1].register_forward_hook(lambda _, __, out: tokens[:, : out.shape[1]])
    with torch.no_grad():
        features = model.encode_image(first["images"])
    assert_same_tokens(found["visual.block_0"], first["visual.block_0"])
    torch.testing.assert_close(features, last["image_features"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_parameters_are_named_and_shaped_as_released(name: str):
    with torch.device("meta"):
        model = EvaClip(ModelConfig.load(name))
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    shapes["logit_scale"] = []  # released without a dimension; save_model writes it so
    assert shapes == RELEASED[name]["parameters"]
    assert sum(p.numel() for p in model.parameters()) == RELEASED[name]["total"]


def test_every_published_architecture_ships():
    shipped = {shipped_name(name) for name in RELEASED}
    assert shipped | {"EVA02-CLIP-demo"} == set(list_models())


@pytest.mark.parametrize(("name", "grid"), [("B16_224", 14), ("L14_336", 24)])
def test_rope_tables_equal_the_originals(name: str, grid: int):
    original = load_file(DATA / "rope_tables.safetensors")
    cos, sin = GridRope(grid, 64, reference_grid=16)(None)
    for ours, kind in ((cos, "cos"), (sin, "sin")):
        pairs = original[f"{name}.freqs_{kind}"][:, ::2]  # they repeat each frequency
        torch.testing.assert_close(ours[1:, 0], pairs, rtol=0, atol=1e-7)
    assert torch.equal(cos[0], torch.ones(1, 32))
    assert torch.equal(sin[0], torch.zeros(1, 32))


def test_rotation_equals_the_original():
    original = load_file(DATA / "rope_tables.safetensors")
    cos, sin = (table[1:] for table in GridRope(14, 64, reference_grid=16)(None))
    x = original["apply.in"].transpose(1, 2)  # heads second in the reference, third here
    torch.testing.assert_close(
        rotate_pairs(x, cos, sin), original["apply.out"].transpose(1, 2), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("change", ["14to24", "224to336_16to24", "24to16", "16to14_psz14to16"])
def test_position_tables_resize_as_the_original(change: str):
    tables = load_file(DATA / "resized_tables.safetensors")
    after = tables[f"{change}.pos_embed.after"]
    grid = round((after.shape[1] - 1) ** 0.5)
    resized = resize_positions(tables[f"{change}.pos_embed.before"], grid)
    torch.testing.assert_close(resized, after, rtol=0, atol=1e-5)


def test_patch_kernels_resize_as_the_original():
    tables = load_file(DATA / "resized_tables.safetensors")
    resized = resize_bicubic(tables["16to14_psz14to16.patch_embed.before"], 16)
    torch.testing.assert_close(
        resized, tables["16to14_psz14to16.patch_embed.after"], rtol=0, atol=1e-5
    )
