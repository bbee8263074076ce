"""Every attention choice gives the same numbers, or one sentence why it cannot be had."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import sys
import types

import pytest
import torch
from torch import Tensor

from evaclip_model.create import create_model
from evaclip_model.errors import InputError
from evaclip_model.model import layers
from evaclip_model.model.layers import (
    attention_kernel,
    auto_attention,
    eager_attention,
    sdpa_attention,
)
from evaclip_model.training.loss.contrastive import contrastive_loss
from tests.evaclip_model.small_models import FAMILIES, small_batch, small_config, small_model

# From float64; the rounding of inputs, weights of the softmax and sums in each dtype.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def reference(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Softmax over the keys in float64, one query at a time."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty_like(q)
    for place in range(q.shape[1]):
        seen = place + 1 if causal else k.shape[1]
        scores = torch.einsum("bhd,bshd->bhs", q[:, place], k[:, :seen]) / q.shape[-1] ** 0.5
        out[:, place] = torch.einsum("bhs,bshd->bhd", scores.softmax(-1), v[:, :seen])
    return out


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kernel", [sdpa_attention, eager_attention, auto_attention])
@pytest.mark.parametrize(
    ("queries", "keys", "causal"), [(9, 9, False), (9, 9, True), (1, 9, False), (1, 1, True)]
)
def test_kernels_agree_with_double_precision(kernel, dtype, queries, keys, causal):
    draw = torch.Generator().manual_seed(queries)
    q, k, v = (torch.randn(3, n, 2, 44, generator=draw) for n in (queries, keys, keys))
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    expected = reference(q, k, v, causal)
    got = kernel(q, k, v, causal)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=TOLERANCE[dtype])
    towards = torch.randn(got.shape, generator=draw)
    gradients = torch.autograd.grad(got, (q, k, v), towards.to(dtype))
    wide = torch.autograd.grad(expected, (q, k, v), towards.to(dtype).double())
    for one, other in zip(gradients, wide, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=4 * TOLERANCE[dtype])


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", 2e-5), ("bf16", 0.1), ("fp16", 0.02)]
)
def test_masked_packed_and_checkpointed_models_agree_under_every_choice(
    precision, tolerance, family, mode
):
    images, tokens, kept = small_batch()
    results = {}
    for choice, dtype in (("sdpa", "fp64"), *((c, precision) for c in ("sdpa", "eager", "auto"))):
        model = small_model(family, precision=dtype, attention=choice).train()
        model.set_grad_checkpointing(mode)
        features = model(images.to(model.logit_scale.dtype), tokens, kept)
        contrastive_loss(*features).backward()
        gradient = torch.cat([p.grad.double().flatten() for p in model.parameters()])
        results[choice, dtype] = features[0].double(), features[1].double(), gradient
    *expected, expected_gradient = results.pop(("sdpa", "fp64"))
    for *features, gradient in results.values():
        for got, wanted in zip(features, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)
        off = (gradient - expected_gradient).norm() / expected_gradient.norm()
        assert float(off) < 4 * tolerance


def test_the_choice_that_runs_can_be_asked_for():
    assert small_model(attention="auto").attention == "sdpa"
    assert small_model(attention="auto", precision="bf16").attention == "eager"
    assert small_model(attention="eager").attention == "eager"


def test_an_unknown_choice_names_the_known_ones():
    with pytest.raises(InputError, match="'flash' is unknown: choose one of auto, sdpa, flash2"):
        create_model(small_config(), attention="flash")


@pytest.mark.parametrize(
    ("choice", "package", "fix"),
    [
        ("flash2", "flash-attn", r"pip install 'evaclip\[cuda\]'"),
        ("flash4", "flash-attn-4", "pip install --pre flash-attn-4"),
    ],
)
def test_a_missing_package_is_named_with_its_fix_and_nothing_takes_its_place(choice, package, fix):
    with pytest.raises(InputError, match=rf"package {package} \(version found: none.*{fix}"):
        create_model(small_config(), attention=choice, precision="bf16")


@pytest.fixture
def flash_packages(monkeypatch):
    """Both packages, as installed beside each other, and a GPU that they run on."""
    calls = []

    def function(name, returns_more):
        def attend(q, k, v, causal=False):
            calls.append(name)
            out = sdpa_attention(q, k, v, causal)
            return (out, None) if returns_more else out

        return attend

    outer, cute = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.cute")
    for module in (outer, cute):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    outer.flash_attn_func = function("flash2", returns_more=False)
    cute.flash_attn_func = function("flash4", returns_more=True)
    monkeypatch.setitem(sys.modules, "flash_attn", outer)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    versions = {"flash-attn": "2.8.3", "flash-attn-4": "4.0.0b36"}
    monkeypatch.setattr(layers.importlib.metadata, "version", versions.__getitem__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return calls


def test_the_two_packages_of_one_namespace_are_told_apart(flash_packages, monkeypatch):
    attention_kernel("flash4", (64, 88))
    # flash-attn-4 alone leaves a namespace without the function of flash-attn.
    monkeypatch.delattr(sys.modules["flash_attn"], "flash_attn_func")
    with pytest.raises(InputError, match=r"package flash-attn \(version found: 2\.8\.3"):
        attention_kernel("flash2", (64, 88))


def test_a_machine_without_cuda_is_refused(flash_packages, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"flash-attn 2\.8\.3\) needs a CUDA device"):
        attention_kernel("flash2")


def test_a_gpu_that_is_too_old_is_refused(flash_packages, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(InputError, match=r"compute capability 8\.x to 12\.x, this one has 7\.5"):
        attention_kernel("flash2")


@pytest.mark.parametrize(("choice", "width"), [("flash2", 264), ("flash2", 20), ("flash4", 136)])
def test_a_head_width_it_does_not_take_is_refused(flash_packages, choice, width):
    with pytest.raises(InputError, match=f"not the model's {width}"):
        attention_kernel(choice, (64, width))


def test_full_precision_is_refused_when_the_model_is_made(flash_packages):
    with pytest.raises(InputError, match=r"float16 and bfloat16 only, not in float32.*'bf16'"):
        create_model(small_config(), attention="flash2")


def test_a_model_left_on_the_cpu_is_refused_and_not_attended_otherwise(flash_packages):
    model = create_model(small_config(), attention="flash2", precision="bf16")
    with pytest.raises(InputError, match="the model is on cpu"):
        model.encode_image(small_batch()[0])
    assert flash_packages == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("choice", ["sdpa", "eager", "flash2", "flash4"])
def test_on_a_gpu_every_choice_that_is_there_agrees_with_the_cpu(choice):
    images, tokens, kept = small_batch()
    try:
        model = small_model(attention=choice, precision="bf16").cuda()
    except InputError as error:
        pytest.skip(str(error))
    expected = small_model()(images, tokens, kept)
    got = model(images.cuda(), tokens, kept.cuda())
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=0, atol=0.1)
