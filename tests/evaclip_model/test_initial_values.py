"""Initial values: the published spread of every tensor, and that of timm's and open_clip's."""

from __future__ import annotations

import re

import pytest
import torch

from evaclip_model.create import create_model
from evaclip_model.model.model_config import INITIAL_LOGIT_SCALE, ModelConfig
from tests.evaclip_model.peers import FAMILIES, in_their_names, peer_of

NORM = r"(norm1|norm2|norm|ln_1|ln_2|ln_final|inner_attn_ln|ffn_ln)"


def published(name: str, config: ModelConfig) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's initial values."""
    vision, text = config.vision, config.text
    width, depth = text.width, 2 * text.layers
    kernel, scale = 3 * vision.patch_px**2, vision.layer_scale_init or 0.0
    block = int(found[1]) + 1 if (found := re.search(r"blocks\.(\d+)", name)) else 0
    rules = {
        "logit_scale": (INITIAL_LOGIT_SCALE, 0),
        rf".+{NORM}\.weight": (1, 0),
        rf".+{NORM}\.bias": (0, 0),
        r"visual\.(cls_token|pos_embed)": (0, 0.02),
        r"visual\.patch_embed\..+": (0, (3 * kernel) ** -0.5),
        r"visual\..+\.(attn\.proj|fc2|w3)\.weight": (0, 0.02 / (2 * block or 1) ** 0.5),
        r"visual\.blocks\..+\.weight": (0, 0.02),
        r"visual\.blocks\..+\.gamma_[12]": (scale, 0),
        r"visual\.head\.weight": (0, 2e-5),
        r"visual\..+bias": (0, 0),
        r"text\.token_embedding\.weight": (0, 0.02),
        r"text\.positional_embedding": (0, 0.01),
        r"text\..+\.in_proj_weight|text\.text_projection": (0, width**-0.5),
        r"text\..+\.(out_proj|c_proj)\.weight": (0, (width * depth) ** -0.5),
        r"text\..+\.c_fc\.weight": (0, (2 * width) ** -0.5),
        r"text\..+\.c_fc\.bias": (0, (3 * width) ** -0.5),  # torch's default: uniform
        r"text\..+\.c_proj\.bias": (0, (12 * width) ** -0.5),
        r"text\..+bias": (0, 0),
    }
    return next(values for pattern, values in rules.items() if re.fullmatch(pattern, name))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_has_the_published_spread(family: str):
    config = FAMILIES[family]
    for name, tensor in create_model(config, seed=0).state_dict().items():
        mean, spread = published(name, config)
        if spread == 0:
            assert torch.equal(tensor, torch.full_like(tensor, mean)), name
            continue
        error = 5 * spread / tensor.numel() ** 0.5  # five standard errors of the mean
        assert float(tensor.mean()) == pytest.approx(0, abs=error), name
        assert float(tensor.std()) == pytest.approx(spread, abs=error), name


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_values_are_spread_as_the_peers(family: str):
    ours = in_their_names(create_model(FAMILIES[family], seed=0).state_dict())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        theirs = peer_of(FAMILIES[family]).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if tensor.numel() == 1 or float(tensor.std()) == 0:
            torch.testing.assert_close(ours[name], tensor, msg=name)
            continue
        spread, count = float(tensor.std()), tensor.numel()
        # Five standard errors of the difference of two samples' standard deviations and means.
        assert float(ours[name].std()) == pytest.approx(spread, rel=5 / count**0.5), name
        assert float(ours[name].mean() - tensor.mean()) == pytest.approx(
            0, abs=5 * spread * (2 / count) ** 0.5
        ), name
