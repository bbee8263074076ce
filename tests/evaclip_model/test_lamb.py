"""LAMB against numbers from the authors' per-parameter version."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evaclip_model.training.optimizer import optimizer as lamb
from evaclip_model.training.optimizer.optimizer import (
    FlatSlice,
    Fragment,
    Lamb,
    LambPart,
    Layout,
    batches_of,
)

DATA = Path(__file__).parent / "data" / "optim"


def lamb_of(parameters, case, **options):
    parts = [
        LambPart([parameters[name] for name in group["names"]], group["lr"], group["weight_decay"])
        for group in case["groups"]
    ]
    return Lamb(parts, betas=tuple(case["betas"]), eps=case["eps"], **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lamb_default", {}),
        ("lamb_no_clip", {}),
        ("lamb_trust_clip", {"trust_clip": (0.0, 1.0)}),
        ("lamb_always_adapt", {"adapt_no_decay": True}),
    ],
)
def test_five_steps_equal_the_authors_lamb(name, options):
    case = json.loads((DATA / f"{name}.json").read_text())
    tensors = load_file(DATA / f"{name}.safetensors")
    names = [name for group in case["groups"] for name in group["names"]]
    parameters = {name: torch.nn.Parameter(tensors[f"init.{name}"].clone()) for name in names}
    optimizer = lamb_of(parameters, case, **options)
    clip = case["options"]["max_grad_norm"]
    for step in range(1, 6):
        norm = case["global_grad_norm_before_clip"][step - 1]
        factor = 1.0 if not clip else max(1.0, norm / clip)
        for name, parameter in parameters.items():
            parameter.grad = tensors[f"step{step}.grad.{name}"] / factor
        optimizer.step()
        for name, parameter in parameters.items():
            torch.testing.assert_close(
                parameter.detach(), tensors[f"step{step}.param.{name}"], atol=1e-6, rtol=1e-5
            )


def test_a_flat_tensor_with_its_layout_steps_like_its_parameters():
    torch.manual_seed(0)
    shapes = [(7, 5), (3,), (11, 2)]
    plain = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    flat = torch.nn.Parameter(torch.cat([part.detach().reshape(-1) for part in plain]))
    starts = [0, 35, 38]
    fragments = tuple(
        Fragment(number, 0, start, part.numel())
        for number, (start, part) in enumerate(zip(starts, plain, strict=True))
    )
    separate, naive = (
        Lamb([LambPart(held, lr=0.1, weight_decay=0.1)])
        for held in (plain, [torch.nn.Parameter(flat.detach().clone())])
    )
    bound = Lamb([LambPart(plain, lr=0.1, weight_decay=0.1)])
    bound.param_groups[0]["params"] = [flat]  # as ZeRO does
    bound.bind_layouts([Layout(fragments, None)])
    for _ in range(5):
        for part in plain:
            part.grad = torch.randn_like(part)
        whole = torch.cat([part.grad.reshape(-1) for part in plain])
        for optimizer in (bound, naive):
            optimizer.param_groups[0]["params"][0].grad = whole.clone()
        for optimizer in (separate, bound, naive):
            optimizer.step()
    expected = torch.cat([part.detach().reshape(-1) for part in plain])
    torch.testing.assert_close(flat.detach(), expected, atol=1e-6, rtol=1e-6)
    assert (naive.param_groups[0]["params"][0] - expected).abs().max() > 1e-3


def test_binding_refuses_a_fragment_outside_the_flat_tensor():
    optimizer = Lamb([LambPart([torch.nn.Parameter(torch.zeros(4))], 1e-3, 0.0)])
    with pytest.raises(ValueError, match="outside"):
        optimizer.bind_layouts([Layout((Fragment(0, 0, 2, 3),), None)])


def test_without_adaptation_it_is_adamw():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)) for _ in range(2))
    lamb = Lamb([LambPart([ours], 0.02, 0.3)], betas=(0.9, 0.98), eps=1e-6, adapt=False)
    adamw = torch.optim.AdamW([theirs], lr=0.02, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.3)
    for _ in range(10):
        gradient = torch.randn(3, 4)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        lamb.step()
        adamw.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_trust_ratios_are_those_it_stepped_with():
    torch.manual_seed(0)
    plain, bias = (torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (5,)))
    optimizer = Lamb([LambPart([plain], 0.1, 0.2), LambPart([bias], 0.1, 0.0)])
    assert optimizer.trust_ratios() == [[], []]
    before = plain.detach().clone()
    plain.grad, bias.grad = torch.randn(4, 3), torch.randn(5)
    optimizer.step()
    direction = plain.grad  # a step leaves the scaled direction there
    ((ratio,), of_no_decay) = optimizer.trust_ratios()
    assert of_no_decay == []
    assert ratio == pytest.approx((before.norm() / (direction / ratio).norm()).item(), rel=1e-5)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_element_is_updated_once_with_others_of_its_decay(device, monkeypatch):
    monkeypatch.setattr(lamb, "CHUNK", 7)
    monkeypatch.setattr(lamb, "BATCH", 20)
    parts = [LambPart([], 1.0, decay) for decay in (0.0, 0.1, 0.0)]
    spans = [FlatSlice(n, n, n % 3, 5 * n, size) for n, size in enumerate((3, 50, 6, 11, 1))]
    largest, updated = {"cpu": 7, "cuda": 20}[device], []
    for decay, batch in batches_of(spans, parts, torch.device(device)):
        assert sum(piece.size for piece in batch) <= largest
        assert {parts[piece.part].weight_decay for piece in batch} == {decay}
        updated += [(p.tensor, e) for p in batch for e in range(p.start, p.start + p.size)]
    expected = [(s.tensor, e) for s in spans for e in range(s.start, s.start + s.size)]
    assert sorted(updated) == sorted(expected)
