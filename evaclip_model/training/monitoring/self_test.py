"""A self-test of two seconds, over a run's real ranks, of what weeks of training rest on: the
gathered loss and the attention kernel, each against a plain computation on tiny tensors. Where
LAMB's tensors are cut over ranks is checked when they are (engine/fp32_state.py)."""

import time
from dataclasses import dataclass

import torch

from evaclip_model.model.clip import EvaClip
from evaclip_model.model.layers import eager_attention
from evaclip_model.training.checkpoint.consensus import Peers
from evaclip_model.training.config import TrainConfig
from evaclip_model.training.loss.objective import make_objective

_ROWS, _CHANNELS = 4, 8
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
EXACT = 1e-5
"""Largest difference in fp32 that is rounding."""


class SelfTestFailed(RuntimeError):
    """Something that training rests on does not hold on this machine."""


@dataclass(frozen=True)
class SelfTest:
    """Largest differences to the plain computation, over all ranks, relative to the largest value:
    of the loss or its gradient, of the output of the model's kernel."""

    loss: float
    attention: float
    attention_kernel: str
    seconds: float


def self_test(model: EvaClip, config: TrainConfig) -> SelfTest:
    """Every rank calls it with its model on its device. Raises SelfTestFailed on every rank when a
    difference on some rank is more than rounding."""
    started = time.perf_counter()
    device, dtype = model.logit_scale.device, model.logit_scale.dtype
    own = (_loss_difference(model, config, device), _attention_difference(model, device, dtype))
    everybody = Peers.every_rank().gather_values(own)
    loss, attention = map(max, zip(*everybody, strict=True))
    near = _TOLERANCES[dtype]
    for what, difference, limit in (
        ("the loss over these ranks differs from that of one process", loss, EXACT),
        (f"attention '{model.attention}' differs from plain products", attention, near),
    ):
        if not difference <= limit:
            raise SelfTestFailed(f"self-test: {what} by {difference:.2g}, more than {limit:g}")
    return SelfTest(loss, attention, model.attention, time.perf_counter() - started)


def _loss_difference(model: EvaClip, config: TrainConfig, device: torch.device) -> float:
    peers = Peers.every_rank()
    rank, ranks = peers.rank, peers.count
    draw = torch.Generator().manual_seed(2)
    features = torch.randn(2, ranks * _ROWS, _CHANNELS, generator=draw)
    image, text = torch.nn.functional.normalize(features, dim=-1).to(device)
    objective = make_objective(config)
    scalars = {name: value.detach() for name, value in objective.read_scalars(model).items()}
    image.requires_grad_()
    expected = objective.compute_terms(image, text, scalars, is_whole_batch=True).loss
    (whole,) = torch.autograd.grad(expected, image)
    mine = slice(rank * _ROWS, (rank + 1) * _ROWS)
    own = image.detach()[mine].clone().requires_grad_()
    loss = objective.compute_terms(own, text[mine], scalars).loss
    (gradient,) = torch.autograd.grad(loss, own)
    mean = peers.add_up(loss.detach().clone())
    value = (mean / ranks - expected.detach()).abs() / expected.detach().abs()
    slope = (gradient / ranks - whole[mine]).abs().max() / whole.abs().max()
    return float(torch.maximum(value, slope))


def _attention_difference(model: EvaClip, device: torch.device, dtype: torch.dtype) -> float:
    draw = torch.Generator().manual_seed(3)
    worst = 0.0
    text = model.config.text
    for heads, width, causal in (
        (model.config.vision.heads, model.config.vision.head_width, False),
        (text.heads, text.width // text.heads, True),
    ):
        q, k, v = torch.randn(3, 2, 9, heads, width, generator=draw).to(device, dtype)
        expected = eager_attention(q.float(), k.float(), v.float(), causal)
        found = model.kernel(q, k, v, causal).float()
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    return worst
