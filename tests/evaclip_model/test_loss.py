"""The contrastive loss in one process and over real ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evaclip_model.training.config import LossSettings
from evaclip_model.training.loss import contrastive
from evaclip_model.training.loss.contrastive import (
    contrastive_loss,
    contrastive_terms,
    gathered_terms,
)
from evaclip_model.training.loss.objective import LossTerms

HERE = Path(__file__).parent
WORKER = HERE / "gather_worker.py"
FEATURES = HERE / "data" / "models" / "loss_two_ranks.safetensors"
EXPECTED = json.loads(FEATURES.with_suffix(".json").read_text())
SCALE = EXPECTED["logit_scale"]
WAYS = ["full", "streamed"]


def unit_features(samples: int, channels: int, dtype: torch.dtype = torch.float32):
    """Images [samples, channels] and captions that are somewhat like them."""
    draw = torch.Generator().manual_seed(0)
    image = torch.randn(samples, channels, generator=draw, dtype=dtype)
    text = image + torch.randn(samples, channels, generator=draw, dtype=dtype)
    return [torch.nn.functional.normalize(side, dim=-1) for side in (image, text)]


def with_gradients(image: Tensor, text: Tensor, scale: float, settings: LossSettings):
    """Terms, and the loss's gradient by images, captions and scale."""
    leaves = [image.clone(), text.clone(), torch.tensor(scale, dtype=image.dtype)]
    terms = contrastive_terms(*[leaf.requires_grad_() for leaf in leaves], settings)
    return LossTerms(*(t.detach() for t in terms)), torch.autograd.grad(terms.loss, leaves)


@pytest.fixture
def on_ranks(ranks, tmp_path):
    def run(count: int, features: Path, scale: float):
        ranks.run(count, tmp_path, WORKER, features, scale, tmp_path)
        return lambda way: [
            load_file(tmp_path / f"{way}-{rank}.safetensors") for rank in range(count)
        ]

    return run


def test_one_process_gives_the_original_loss_and_gradients():
    expected = load_file(FEATURES)
    image = expected["image_features_all"].requires_grad_()
    text = expected["text_features_all"].requires_grad_()
    scale = torch.tensor(SCALE, requires_grad=True)
    loss = contrastive_loss(image, text, scale)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(EXPECTED["whole"]["loss"], abs=1e-6)
    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx(EXPECTED["whole"]["dlogit_scale"], abs=1e-6)
    torch.testing.assert_close(image.grad, expected["single_process.d_image"], rtol=0, atol=1e-6)
    torch.testing.assert_close(text.grad, expected["single_process.d_text"], rtol=0, atol=1e-6)


def test_two_ranks_give_the_original_losses_accuracies_and_gradients(on_ranks):
    expected, ranks = load_file(FEATURES), EXPECTED["ranks"]
    of = on_ranks(2, FEATURES, SCALE)
    for rank, got in enumerate([*of("full"), *of("streamed")]):
        rank %= 2
        assert float(got["loss"]) == pytest.approx(ranks["loss_per_rank"][rank], abs=1e-6)
        assert float(got["d_scale"]) == pytest.approx(
            ranks["dlogit_scale_per_rank"][rank], abs=1e-6
        )
        assert {key: float(got[key]) for key in ("i2t", "t2i")} == ranks["acc_per_rank"][rank]
        for side in ("image", "text"):
            original = expected[f"localTrue_gatherTrue.d_{side}"].chunk(2)[rank]
            torch.testing.assert_close(got[f"d_{side}"], original, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_mean_over_ranks_is_the_whole_batch_in_one_process(on_ranks, tmp_path, count):
    image, text = unit_features(24, 16)
    whole = tmp_path / "features.safetensors"
    save_file({"image_features_all": image, "text_features_all": text}, whole)
    of = on_ranks(count, whole, SCALE)
    for smoothing in (0.0, 0.1):
        terms, (d_image, d_text, d_scale) = with_gradients(
            image.double(), text.double(), SCALE, LossSettings("full", smoothing)
        )
        for way in WAYS:
            got = of(way if smoothing == 0 else f"{way}, smoothed")
            loss, to_text, to_image, scale = (
                sum(float(part[key]) for part in got) / count
                for key in ("loss", "i2t", "t2i", "d_scale")
            )
            assert loss == pytest.approx(float(terms.loss), rel=5e-7)
            assert scale == pytest.approx(float(d_scale), abs=1e-7)
            assert to_text == pytest.approx(float(terms.image_to_text_accuracy))
            assert to_image == pytest.approx(float(terms.text_to_image_accuracy))
            for side, expected in (("image", d_image), ("text", d_text)):
                gradient = torch.cat([part[f"d_{side}"] for part in got]) / count
                error = float((gradient - expected).abs().max())
                assert error < 1.5e-7


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("chunk", [(4, 6), (7, 50), (50, 7), (50, 50)])
def test_streaming_is_the_same_function_whatever_the_chunks(monkeypatch, chunk, smoothing):
    monkeypatch.setattr(contrastive, "CHUNK_ROWS", chunk[0])
    monkeypatch.setattr(contrastive, "CHUNK_COLUMNS", chunk[1])
    features = unit_features(23, 8, torch.float64)
    full, streamed = (with_gradients(*features, 30.0, LossSettings(way, smoothing)) for way in WAYS)
    assert float(streamed[0].loss) == pytest.approx(float(full[0].loss), rel=1e-13)
    assert streamed[0][1:] == full[0][1:]
    for ours, theirs in zip(streamed[1], full[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("way", WAYS)
def test_smoothing_spreads_its_share_over_all_columns(way):
    image, text = unit_features(9, 8, torch.float64)
    terms = contrastive_terms(image, text, torch.tensor(5.0), LossSettings(way, 0.3))
    logits = 5 * image @ text.T
    targets = 0.7 * torch.eye(9) + 0.3 / 9
    rows, columns = (-(targets * logits.log_softmax(side)).sum() / 9 for side in (1, 0))
    assert float(terms.loss) == pytest.approx(float(rows + columns) / 2)


@pytest.mark.parametrize("way", WAYS)
def test_equal_scores_are_a_hit_for_the_first_alone(way, monkeypatch):
    monkeypatch.setattr(contrastive, "CHUNK_COLUMNS", 2)
    same = torch.nn.functional.normalize(torch.ones(5, 4), dim=-1)
    terms = contrastive_terms(same, same, torch.tensor(3.0), LossSettings(way))
    assert float(terms.image_to_text_accuracy) == pytest.approx(0.2)


@pytest.mark.parametrize("way", WAYS)
def test_a_feature_that_is_no_number_makes_a_loss_that_is_none(way):
    image, text = unit_features(6, 4)
    image[3, 1] = torch.nan
    assert contrastive_terms(image, text, torch.tensor(3.0), LossSettings(way)).loss.isnan()


def test_auto_streams_when_the_full_loss_would_take_over_a_gibibyte():
    assert not LossSettings().should_stream(4096, 4096)
    assert LossSettings().should_stream(8192, 8192)
    assert LossSettings().should_stream(2048, 32768)
    most = 2**30 // (6 * 4)  # six matrices of four bytes an element
    assert not LossSettings().should_stream(1, most)
    assert LossSettings().should_stream(1, most + 1)
    assert LossSettings("streamed").should_stream(2, 2)
    assert not LossSettings("full").should_stream(2**20, 2**20)


def test_what_cannot_be_a_loss_is_refused():
    with pytest.raises(ValueError, match="label_smoothing"):
        LossSettings("full", 1.0)
    for image, text in ((torch.ones(4, 3), torch.ones(3, 3)), (torch.ones(4), torch.ones(4))):
        with pytest.raises(ValueError, match=r"features of pairs must both be \[b, E\]"):
            contrastive_loss(image, text, torch.tensor(1.0))


def test_without_a_process_group_gathering_is_the_plain_loss():
    image, text = torch.nn.functional.normalize(torch.randn(2, 6, 4), dim=-1)
    plain, gathered = (
        f(image, text, torch.tensor(9.0)) for f in (contrastive_terms, gathered_terms)
    )
    assert plain == gathered


@pytest.mark.parametrize("way", WAYS)
def test_matched_features_are_all_hits_and_half_precision_is_widened(way):
    features = torch.eye(4, dtype=torch.bfloat16)
    terms = contrastive_terms(features, features, torch.tensor(100.0), LossSettings(way))
    assert terms.loss.dtype == torch.float32
    assert float(terms.image_to_text_accuracy) == float(terms.text_to_image_accuracy) == 1
