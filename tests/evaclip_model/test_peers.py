"""The model against timm's and open_clip's independent implementations with the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from evaclip_model.clip import EvaClip
from evaclip_model.create import create_model
from evaclip_model.loss import contrastive_loss
from evaclip_model.model_config import ModelConfig
from evaclip_model.tokenizer import tokenize
from tests.evaclip_model.peer_libraries import open_clip
from tests.evaclip_model.peers import (
    FAMILIES,
    TEXT,
    batch_of,
    in_their_names,
    peer_of,
    randomise,
    twin_of,
)

CAPTIONS = ["a photo of a dog", "", "Mötley Crüe's <b>tour</b> &amp; 10,000 fans 🎸", "very " * 90]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: grad for name, grad in found.items() if grad is not None}


def assert_same_gradients(ours: EvaClip, theirs: nn.Module, relative: float) -> None:
    got, expected = in_their_names(gradients(ours)), gradients(theirs)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((got[name] - gradient).norm()) <= relative * float(gradient.norm()), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_features_logits_and_loss_are_those_of_the_peers(
    family: str, dtype: torch.dtype, tolerance: float
):
    ours = randomise(EvaClip(FAMILIES[family])).to(dtype)
    theirs = twin_of(ours)
    images, tokens = batch_of(ours.config)
    images = images.to(dtype)
    with torch.no_grad():
        got, expected = ours(images, tokens), theirs(images, tokens)
        pairs = [
            (ours.encode_image(images), theirs.encode_image(images)),
            (ours.encode_text(tokens), theirs.encode_text(tokens)),
            (got[2] * got[0] @ got[1].T, theirs.get_logits(images, tokens)[0]),
            (contrastive_loss(*got), open_clip.ClipLoss()(*expected)),
        ]
    for ours_value, their_value in pairs:
        torch.testing.assert_close(ours_value, their_value, rtol=0, atol=tolerance)
    assert float(pairs[0][0].std()) > 0.1  # nothing is equal because it is all but zero


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_peers(family: str):
    ours = randomise(EvaClip(FAMILIES[family])).double()
    theirs = twin_of(ours)
    images, tokens = batch_of(ours.config)
    contrastive_loss(*ours(images.double(), tokens)).backward()
    open_clip.ClipLoss()(*theirs(images.double(), tokens)).backward()
    assert_same_gradients(ours, theirs, relative=1e-11)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_masked_training_step_is_that_of_the_peers_with_the_same_patches(family: str):
    ours = randomise(EvaClip(FAMILIES[family])).double().train()
    theirs = twin_of(ours, patch_drop=0.5).train()
    images, tokens = batch_of(ours.config)
    patches = ours.config.vision.num_patches
    torch.manual_seed(5)  # timm keeps the first half of the order of this draw
    kept = torch.randn(len(images), patches).argsort(dim=-1)[:, : patches // 2]
    torch.manual_seed(5)
    expected = theirs(images.double(), tokens)
    got = ours(images.double(), tokens, kept)
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-12)
    contrastive_loss(*got).backward()
    open_clip.ClipLoss()(*expected).backward()
    assert_same_gradients(ours, theirs, relative=1e-11)


def test_text_of_the_whole_vocabulary_and_context_is_that_of_the_peer():
    text = {**TEXT, "context_length": 77, "vocab_size": 49_408}
    vision = FAMILIES["EVA01-CLIP-g"].vision.model_dump()
    config = {"embed_dim": 48, "vision": vision, "text": text}
    ours = randomise(EvaClip(ModelConfig.load(config))).double()
    tokens = tokenize(CAPTIONS)
    with torch.no_grad():
        got, expected = ours.encode_text(tokens), twin_of(ours).encode_text(tokens)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


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


def test_two_architectures_in_one_process_do_not_influence_each_other():
    made = {name: randomise(EvaClip(FAMILIES[name])) for name in FAMILIES}
    with torch.no_grad():
        together = {name: made[name](*batch_of(FAMILIES[name])) for name in reversed(FAMILIES)}
        for name, features in together.items():
            alone = randomise(EvaClip(FAMILIES[name]))(*batch_of(FAMILIES[name]))
            assert all(torch.equal(*pair) for pair in zip(features, alone, strict=True)), name
