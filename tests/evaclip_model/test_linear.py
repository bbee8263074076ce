"""The product of linear layers equals torch's, whichever library computes it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from evaclip_model.cpu.linear import Linear, linear

SHAPES = [((5, 7, 24), 40, True), ((3, 16), 8, False), ((4, 1, 32), 16, True), ((0, 16), 8, True)]


@pytest.mark.parametrize(("shape", "out", "has_bias"), SHAPES)
def test_products_and_all_their_gradients_equal_torchs(shape, out, has_bias):
    torch.manual_seed(0)
    inputs = [torch.randn(shape), torch.randn(out, shape[-1])] + [torch.randn(out)] * has_bias
    towards = torch.randn(*shape[:-1], out)
    results = []
    for product, dtype in ((linear, torch.float32), (F.linear, torch.float64)):
        leaves = [value.to(dtype, copy=True).requires_grad_() for value in inputs]
        result = product(*leaves)
        result.backward(towards.to(dtype))
        results.append([result.detach().float(), *(leaf.grad.float() for leaf in leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_views_that_are_not_contiguous_are_multiplied_as_they_are_seen():
    torch.manual_seed(0)
    x, weight = torch.randn(6, 9, 16)[:, :1], torch.randn(16, 12).t()
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-5)


def test_gradients_of_expanded_outputs_are_right():
    torch.manual_seed(0)
    layer, plain = Linear(8, 4), torch.nn.Linear(8, 4)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(5, 8)
    for module in (layer, plain):
        module(x).sum().backward()  # its gradient is one number, expanded
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad)


def test_only_what_asks_for_a_gradient_gets_one():
    x, weight = torch.randn(3, 8), torch.randn(4, 8, requires_grad=True)
    linear(x, weight).sum().backward()
    assert x.grad is None
    assert weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_torchs_own_product(dtype):
    x, weight = torch.randn(3, 8).to(dtype), torch.randn(4, 8).to(dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_autocast_decides_the_dtype():
    layer = Linear(8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 8)).dtype == torch.bfloat16
