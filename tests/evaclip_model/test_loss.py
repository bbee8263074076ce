"""The contrastive losses in one process and over real ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evaclip_model.training.loss import contrastive
from evaclip_model.training.loss.contrastive import (
    contrastive_loss,
    gathered_contrastive_loss,
    pair_terms,
)
from tests.evaclip_model.plain_loss import (
    TEACHER,
    WAYS,
    pair_numbers,
    plain_terms,
    teachers_of,
    with_gradients,
)

HERE = Path(__file__).parent
WORKER = HERE / "gather_worker.py"
FEATURES = HERE / "data" / "models" / "loss_two_ranks.safetensors"
EXPECTED = json.loads(FEATURES.with_suffix(".json").read_text())
SCALE = EXPECTED["logit_scale"]


def unit_features(samples: int, channels: int, dtype: torch.dtype = torch.float32):
    """Images [samples, channels] and captions that are somewhat like them."""
    draw = torch.Generator().manual_seed(0)
    image = torch.randn(samples, channels, generator=draw, dtype=dtype)
    text = image + torch.randn(samples, channels, generator=draw, dtype=dtype)
    return [torch.nn.functional.normalize(side, dim=-1) for side in (image, text)]


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
    for rank, got in enumerate(of("softmax")):
        assert float(got["loss"]) == pytest.approx(ranks["loss_per_rank"][rank], abs=1e-6)
        assert float(got["d_scale"]) == pytest.approx(
            ranks["dlogit_scale_per_rank"][rank], abs=1e-6
        )
        assert {key: float(got[key]) for key in ("i2t", "t2i")} == ranks["acc_per_rank"][rank]
        for side in ("image", "text"):
            original = expected[f"localTrue_gatherTrue.d_{side}"].chunk(2)[rank]
            torch.testing.assert_close(got[f"d_{side}"], original, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_the_mean_over_ranks_is_the_whole_batch_in_one_process(on_ranks, tmp_path, count):
    image, text = unit_features(30, 16, torch.float64)
    whole = tmp_path / "features.safetensors"
    save_file({"image_features_all": image, "text_features_all": text}, whole)
    of = on_ranks(count, whole, SCALE)
    captions = pair_numbers(30)
    for name, way in WAYS.items():
        given = image, text, captions, SCALE, way, teachers_of(30, way.get("teachers", ()))
        expected = with_gradients(plain_terms, *given)
        got = of(name)
        for key, value in expected.items():
            if value.ndim:
                gradient = torch.cat([part[key] for part in got]) / count
                assert float((gradient - value).abs().max()) < 1e-12 * max(1, value.abs().max())
            else:
                mean = sum(float(part[key]) for part in got) / count
                near = 2e-6 if key in ("i2t", "t2i") else 1e-12
                assert mean == pytest.approx(float(value), rel=near, abs=near), (name, key)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("block", [(4, 6), (7, 50), (50, 7), (50, 50)])
def test_blocks_are_the_full_matrix_to_double_precision(monkeypatch, block, way):
    monkeypatch.setattr(contrastive, "BLOCK_ROWS", block[0])
    monkeypatch.setattr(contrastive, "BLOCK_COLUMNS", block[1])
    teachers = teachers_of(23, WAYS[way].get("teachers", ()))
    given = *unit_features(23, 8, torch.float64), pair_numbers(23), 30.0, WAYS[way], teachers
    found, expected = (with_gradients(loss, *given) for loss in (pair_terms, plain_terms))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key].double(), value, rtol=1e-6 if key in ("i2t", "t2i") else 1e-10, atol=1e-13
        )


def test_memory_of_a_loss_does_not_grow_with_the_square_of_the_batch():
    made = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            made.extend(
                one.numel()
                for one in torch.utils._pytree.tree_leaves(found)
                if isinstance(one, torch.Tensor)
            )
            return found

    features = unit_features(9000, 2)
    teachers = {"teachers": teachers_of(9000, [2]), "teacher": TEACHER}
    for bias, given in (([], {}), ([torch.tensor(-10.0)], {}), ([], teachers)):
        made.clear()
        leaves = [side.clone().requires_grad_() for side in features]
        with Largest():
            terms = pair_terms(*leaves, torch.tensor(9.0), *bias, **given)
            terms.loss.backward()
        assert max(made) == contrastive.BLOCK_ROWS * contrastive.BLOCK_COLUMNS


@pytest.mark.parametrize("bias", [[], [torch.tensor(-10.0)]])
def test_equal_scores_are_a_hit_for_the_first_alone(bias, monkeypatch):
    monkeypatch.setattr(contrastive, "BLOCK_COLUMNS", 2)
    same = torch.nn.functional.normalize(torch.ones(5, 4), dim=-1)
    terms = pair_terms(same, same, torch.tensor(3.0), *bias)
    assert float(terms.image_to_text_accuracy) == pytest.approx(0.2)


@pytest.mark.parametrize("bias", [[], [torch.tensor(-10.0)]])
def test_a_feature_that_is_no_number_makes_a_loss_that_is_none(bias):
    image, text = unit_features(6, 4)
    image[3, 1] = torch.nan
    assert pair_terms(image, text, torch.tensor(3.0), *bias).loss.isnan()


def test_what_cannot_be_a_loss_is_refused():
    for image, text in ((torch.ones(4, 3), torch.ones(3, 3)), (torch.ones(4), torch.ones(4))):
        with pytest.raises(ValueError, match=r"features of pairs must both be \[b, E\]"):
            contrastive_loss(image, text, torch.tensor(1.0))


def test_without_a_process_group_gathering_is_the_plain_loss():
    image, text = torch.nn.functional.normalize(torch.randn(2, 6, 4), dim=-1)
    plain, gathered = (
        f(image, text, torch.tensor(9.0)) for f in (contrastive_loss, gathered_contrastive_loss)
    )
    assert plain == gathered


def test_matched_features_are_all_hits_and_half_precision_is_widened():
    features = torch.eye(4, dtype=torch.bfloat16)
    terms = pair_terms(features, features, torch.tensor(100.0))
    assert terms.loss.dtype == torch.float32
    assert float(terms.image_to_text_accuracy) == float(terms.text_to_image_accuracy) == 1
