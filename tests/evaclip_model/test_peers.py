"""The model against timm's and open_clip's independent implementations with the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from evaclip_model.model.clip import EvaClip
from evaclip_model.model.model_config import ModelConfig
from evaclip_model.tokenizer.tokenizer import tokenize
from evaclip_model.training.loss.contrastive import contrastive_loss
from tests.evaclip_model.peer_libraries import open_clip
from tests.evaclip_model.peers import FAMILIES, TEXT, batch_of, in_their_names, randomise, twin_of

CAPTIONS = ["a photo of a dog", "", "Mötley Crüe's <b>tour</b> &amp; 10,000 fans 🎸", "very " * 90]


def with_vision(family: str, **changed: object) -> ModelConfig:
    values = FAMILIES[family].model_dump()
    return ModelConfig.load({**values, "vision": {**values["vision"], **changed}})


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
    for ours_value, their_value in pairs:  # logits are as large as the inverse temperature
        torch.testing.assert_close(ours_value, their_value, rtol=tolerance, atol=tolerance)
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
    config = {**FAMILIES["EVA01-CLIP-g"].model_dump(), "text": text}
    ours = randomise(EvaClip(ModelConfig.load(config))).double()
    tokens = tokenize(CAPTIONS)
    with torch.no_grad():
        got, expected = ours.encode_text(tokens), twin_of(ours).encode_text(tokens)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_stochastic_depth_is_that_of_the_peer_and_only_in_training(family: str):
    ours = randomise(EvaClip(with_vision(family, drop_path=0.5))).double()
    theirs, images = twin_of(ours), batch_of(ours.config)[0].double()
    plain = randomise(EvaClip(FAMILIES[family])).double()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        assert torch.equal(ours.eval().encode_image(images), plain.encode_image(images))
        features = []
        for tower in (ours.train(), theirs.train()):
            torch.manual_seed(3)  # both draw one number a sample and branch
            features.append(tower.encode_image(images))
    torch.testing.assert_close(*features, rtol=0, atol=1e-12)
    assert not torch.allclose(features[0], plain.encode_image(images))


@pytest.mark.parametrize("family", FAMILIES)
def test_mean_pooling_is_of_all_tokens_and_normed_afterwards(family: str):
    ours = randomise(EvaClip(with_vision(family, pooling="mean"))).double()
    theirs, images = twin_of(ours).visual.trunk, batch_of(ours.config)[0].double()
    with torch.no_grad():
        tokens = theirs.forward_features(images)  # timm's own mean leaves the class token out
        expected = theirs.head(theirs.fc_norm(tokens.mean(dim=1)))
        torch.testing.assert_close(ours.encode_image(images), expected, rtol=0, atol=1e-12)


def test_two_architectures_in_one_process_do_not_influence_each_other():
    made = {name: randomise(EvaClip(FAMILIES[name])) for name in FAMILIES}
    with torch.no_grad():
        together = {name: made[name](*batch_of(FAMILIES[name])) for name in reversed(FAMILIES)}
        for name, features in together.items():
            alone = randomise(EvaClip(FAMILIES[name]))(*batch_of(FAMILIES[name]))
            assert all(torch.equal(*pair) for pair in zip(features, alone, strict=True)), name
