"""Gradient checkpointing: the same numbers from less memory."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from evaclip_model.errors import InputError
from evaclip_model.training.loss.contrastive import contrastive_loss
from tests.evaclip_model.small_models import FAMILIES, small_batch, small_model


def trained_once(mode, family="EVA-02", precision="fp32", **options):
    images, tokens, kept = small_batch()
    model = small_model(family, precision=precision, **options).train()
    model.set_grad_checkpointing(mode)
    torch.manual_seed(5)  # of stochastic depth
    loss = contrastive_loss(*model(images.to(model.logit_scale.dtype), tokens, kept))
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_gradient_is_the_same_as_without(family, attention, mode):
    vision = {"drop_path": 0.5}
    for precision in ("fp32", "bf16"):
        plain, other = (
            trained_once(m, family, precision, attention=attention, vision=vision)
            for m in ("none", mode)
        )
        for got, expected in zip(other, plain, strict=True):
            assert torch.equal(got, expected)


def kept_bytes(mode):
    """Bytes of distinct tensors that one image tower's forward keeps for its backward."""
    images, _, _ = small_batch(32)
    model = small_model(vision={"layers": 12}, attention="sdpa").train()
    model.set_grad_checkpointing(mode)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = model.encode_image(images)
    assert features.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def test_full_checkpointing_keeps_little_more_than_the_blocks_inputs():
    block_input = 32 * 17 * 64 * 4
    assert 12 * block_input <= kept_bytes("full") < 18 * block_input
    assert kept_bytes("full") < 0.2 * kept_bytes("none")


class Counting(TorchDispatchMode):
    """Counts operators that are really computed."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.counts[op.name().split(".")[0]] += 1
        return op(*args, **(kwargs or {}))


def test_products_are_not_computed_twice_in_selective_checkpointing():
    def computed(mode):
        with Counting() as counting:
            trained_once(mode, attention="sdpa")
        heavy = ("mkldnn::_linear_pointwise", "aten::mm", "aten::addmm")
        return sum(counting.counts[name] for name in heavy), counting.counts["aten::silu"]

    plain, selective, full = (computed(mode) for mode in ("none", "selective", "full"))
    assert plain[0] == selective[0] < full[0]
    assert plain[1] < selective[1] == full[1]


def test_nothing_is_kept_without_gradients():
    images, _, _ = small_batch()
    model = small_model()
    model.set_grad_checkpointing("full")
    with torch.no_grad():
        expected = model.encode_image(images)
    model.set_grad_checkpointing("none")
    assert torch.equal(model.encode_image(images).detach(), expected)


def test_an_unknown_mode_is_one_sentence():
    with pytest.raises(InputError, match="'half' is unknown: choose one of none, selective, full"):
        small_model().set_grad_checkpointing("half")
