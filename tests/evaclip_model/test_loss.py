"""The contrastive loss in one process and over real ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from evaclip_model.training.loss import contrastive_loss, contrastive_terms, gathered_terms

HERE = Path(__file__).parent
WORKER = HERE / "gather_worker.py"
FEATURES = HERE / "data" / "models" / "loss_two_ranks.safetensors"
EXPECTED = json.loads(FEATURES.with_suffix(".json").read_text())
SCALE = EXPECTED["logit_scale"]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("gather")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(HERE.parents[1])
    outs = [folder / f"{rank}.safetensors" for rank in range(2)]
    processes = [
        subprocess.Popen(
            list(map(str, (sys.executable, WORKER, rank, folder / "meet", FEATURES, SCALE, out))),
            env=environment,
        )
        for rank, out in enumerate(outs)
    ]
    assert [process.wait(120) for process in processes] == [0, 0]
    return [load_file(out) for out in outs]


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


def test_each_of_two_ranks_gives_the_original_loss_accuracy_and_gradients(two_ranks):
    expected, ranks = load_file(FEATURES), EXPECTED["ranks"]
    for rank, got in enumerate(two_ranks):
        assert float(got["loss"]) == pytest.approx(ranks["loss_per_rank"][rank], abs=1e-6)
        assert float(got["d_scale"]) == pytest.approx(
            ranks["dlogit_scale_per_rank"][rank], abs=1e-6
        )
        assert {key: float(got[key]) for key in ("i2t", "t2i")} == ranks["acc_per_rank"][rank]
        for side in ("image", "text"):
            original = expected[f"localTrue_gatherTrue.d_{side}"].chunk(2)[rank]
            torch.testing.assert_close(got[f"d_{side}"], original, rtol=0, atol=1e-6)


def test_the_mean_over_ranks_is_the_whole_batch(two_ranks):
    expected = load_file(FEATURES)
    mean = sum(float(got["loss"]) for got in two_ranks) / 2
    assert mean == pytest.approx(EXPECTED["whole"]["loss"], abs=1e-6)
    for side in ("image", "text"):
        gradients = torch.cat([got[f"d_{side}"] for got in two_ranks]) / 2
        torch.testing.assert_close(
            gradients, expected[f"single_process.d_{side}"], rtol=0, atol=1e-6
        )


def test_without_a_process_group_gathering_is_the_plain_loss():
    image, text = torch.nn.functional.normalize(torch.randn(2, 6, 4), dim=-1)
    plain, gathered = (
        f(image, text, torch.tensor(9.0)) for f in (contrastive_terms, gathered_terms)
    )
    assert plain == gathered


def test_matched_features_are_all_hits_and_half_precision_is_widened():
    features = torch.eye(4, dtype=torch.bfloat16)
    terms = contrastive_terms(features, features, torch.tensor(100.0))
    assert terms.loss.dtype == torch.float32
    assert float(terms.image_to_text_accuracy) == float(terms.text_to_image_accuracy) == 1
