"""A self-test of two seconds, over a run's real ranks, of the parts that weeks of training rest on:
LAMB on tensors that are cut over ranks, the gathered loss, the attention kernel, each against a
plain computation on tiny tensors."""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from evaclip_model.model.clip import EvaClip
from evaclip_model.model.layers import eager_attention
from evaclip_model.training.checkpoint.consensus import Peers
from evaclip_model.training.config import TrainConfig
from evaclip_model.training.loss.objective import make_objective
from evaclip_model.training.optimizer.optimizer import Fragment, Lamb, LambPart, Layout

_SHAPES = ((5, 3), (7, 4), (11,))
"""Odd sizes, so that ranks cut through the middle of parameters."""
_ROWS, _CHANNELS = 4, 8
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
EXACT = 1e-5
"""Largest difference in fp32 that is rounding."""


class SelfTestFailed(RuntimeError):
    """Something that training rests on does not hold on this machine."""


@dataclass(frozen=True)
class SelfTest:
    """Largest differences to the plain computation, over all ranks, relative to the largest value:
    of weights after a step, of the loss or its gradient, of the output of the model's kernel."""

    lamb: float
    loss: float
    attention: float
    attention_kernel: str
    seconds: float


def self_test(model: EvaClip, config: TrainConfig) -> SelfTest:
    """Every rank calls it with its model on its device. Raises SelfTestFailed on every rank when a
    difference on some rank is more than rounding."""
    started = time.perf_counter()
    device, dtype = model.logit_scale.device, model.logit_scale.dtype
    own = (
        _lamb_difference(config, device),
        _loss_difference(model, config, device),
        _attention_difference(model, device, dtype),
    )
    everybody = Peers.every_rank().gather_values(own)
    lamb, loss, attention = map(max, zip(*everybody, strict=True))
    near = _TOLERANCES[dtype]
    for what, difference, limit in (
        ("LAMB over these ranks differs from LAMB on whole tensors", lamb, EXACT),
        ("the loss over these ranks differs from that of one process", loss, EXACT),
        (f"attention '{model.attention}' differs from plain products", attention, near),
    ):
        if not difference <= limit:
            raise SelfTestFailed(f"self-test: {what} by {difference:.2g}, more than {limit:g}")
    return SelfTest(lamb, loss, attention, model.attention, time.perf_counter() - started)


def _lamb_difference(config: TrainConfig, device: torch.device) -> float:
    peers = Peers.every_rank()
    rank, ranks = peers.rank, peers.count
    draw = torch.Generator().manual_seed(1)
    values, gradients = (
        [torch.randn(shape, generator=draw).to(device) for shape in _SHAPES] for _ in range(2)
    )
    flat_values, flat_gradients = map(parameters_to_vector, (values, gradients))
    whole = [value.clone() for value in values]
    for tensor, gradient in zip(whole, gradients, strict=True):
        tensor.grad = gradient
    _make_lamb(whole, config).step()
    flat_whole = parameters_to_vector(whole)
    size = -(-len(flat_values) // ranks)
    start, stop = rank * size, min((rank + 1) * size, len(flat_values))
    cut = _make_lamb(values, config)
    piece = flat_values[start:stop].clone()
    piece.grad = flat_gradients[start:stop].clone()
    cut.param_groups[0]["params"] = [piece]
    fragments, first = [], 0
    for number, value in enumerate(values):
        low, high = max(start, first), min(stop, first + value.numel())
        if low < high:
            fragments.append(Fragment(number, low - first, low - start, high - low))
        first += value.numel()
    group = dist.group.WORLD if ranks > 1 else None
    cut.bind_layouts([Layout(tuple(fragments), group)])
    cut.step()
    if start >= stop:
        return 0.0
    return float((piece - flat_whole[start:stop]).abs().max() / flat_whole.abs().max())


def _make_lamb(tensors: list[Tensor], config: TrainConfig) -> Lamb:
    return Lamb(
        [LambPart(tensors, 0.1, config.weight_decay)],
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        trust_clip=config.lamb.trust_clip,
        adapt_no_decay=True,
    )


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
