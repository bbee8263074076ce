"""All losses written down plainly, over the full matrix of a batch in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evaclip_model.training.config import TeacherConfig

WAYS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax, smoothed": {"label_smoothing": 0.1},
    "softmax, positive": {"same": "positive"},
    "softmax, ignore, smoothed": {"same": "ignore", "label_smoothing": 0.1},
    "sigmoid": {"bias": -3.0},
    "sigmoid, positive": {"bias": -3.0, "same": "positive"},
    "sigmoid, ignore": {"bias": -3.0, "same": "ignore"},
    "softmax, a teacher": {"teachers": [5]},
    "softmax, ignore, smoothed, three teachers": {
        **{"same": "ignore", "label_smoothing": 0.1},
        "teachers": [5, 16, 16],
    },
    "sigmoid, two teachers": {"bias": -3.0, "teachers": [5, 3]},
}
TEACHER = TeacherConfig(models=("a teacher",), weight=0.3, logit_scale=20)


def teachers_of(samples: int, channels: Sequence[int]) -> list[Tensor]:
    """Features [samples, 2, D] of each teacher, of half precision as they are stored."""
    draw = torch.Generator().manual_seed(1)
    found = [torch.randn(samples, 2, width, generator=draw) for width in channels]
    return [F.normalize(one, dim=-1).half() for one in found]


def pair_numbers(samples: int) -> Tensor:
    """[samples, 2] int64 of captions and images; some captions stand there twice, one four times,
    some images twice, and one image and caption of a pair are those of two others."""
    places = torch.arange(samples)
    captions, images = places % max(1, samples - 5) // 2 * 10**15, (places % (samples - 4)) - 10**18
    images[3] = images[2]
    return torch.stack((captions, images), dim=1)


def with_gradients(
    loss: Callable[..., Any],
    image: Tensor,
    text: Tensor,
    captions: Tensor,
    scale: float,
    way: Mapping[str, Any],
    teachers: Sequence[Tensor] = (),
) -> dict[str, Tensor]:
    """Loss, accuracies and gradients of `loss`, which takes the arguments of `pair_terms`."""
    leaves = {"image": image.clone(), "text": text.clone()}
    leaves["scale"] = torch.tensor(scale, dtype=image.dtype)
    if "bias" in way:
        leaves["bias"] = torch.tensor(way["bias"], dtype=image.dtype)
    options: dict[str, Any] = {"label_smoothing": way.get("label_smoothing", 0.0)}
    if "same" in way:
        options |= {"captions": captions, "ignores_same": way["same"] == "ignore"}
    if teachers:
        options |= {"teachers": teachers, "teacher": TEACHER}
    terms = loss(*(leaf.requires_grad_() for leaf in leaves.values()), **options)
    gradients = torch.autograd.grad(terms[0], list(leaves.values()))
    figures = zip(("loss", "i2t", "t2i"), terms, strict=True)
    return {
        **{name: value.detach() for name, value in figures},
        **{f"d_{name}": d for name, d in zip(leaves, gradients, strict=True)},
    }


def plain_terms(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    captions: Tensor | None = None,
    ignores_same: bool = False,
    label_smoothing: float = 0.0,
    teachers: Sequence[Tensor] = (),
    teacher: TeacherConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, image-to-text and text-to-image accuracy of a whole batch [B, E]."""
    if teacher is not None:
        settings = {"captions": captions, "ignores_same": ignores_same}
        alone = plain_terms(image, text, scale, bias, label_smoothing=label_smoothing, **settings)
        ours, divergence = scale * image @ text.T, torch.zeros_like(scale)
        for one in teachers:
            known = teacher.logit_scale * one[:, 0].to(ours) @ one[:, 1].to(ours).T
            for student, target in ((ours, known), (ours.T, known.T)):
                wanted = target.log_softmax(1)
                divergence = divergence + F.kl_div(
                    student.log_softmax(1), wanted, reduction="batchmean", log_target=True
                ) / (2 * len(teachers))
        return (1 - teacher.weight) * alone[0] + teacher.weight * divergence, *alone[1:]
    own = torch.eye(len(image), dtype=torch.bool)
    same = own if captions is None else (captions[:, None] == captions).any(-1)
    right, counted = (own, ~same | own) if ignores_same else (same, torch.ones_like(own))
    logits = scale * image @ text.T
    found = logits.detach().masked_fill(~counted, -torch.inf)
    hits = [right.gather(1, side.argmax(1)[:, None]).double().mean() for side in (found, found.T)]
    if ignores_same:
        hits = [same.gather(1, s.argmax(1)[:, None]).double().mean() for s in (found, found.T)]
    if bias is not None:
        signs = 2.0 * right.to(logits.dtype) - 1
        losses = -F.logsigmoid(signs * (logits + bias)).masked_fill(~counted, 0)
        return losses.sum() / len(image), *hits
    right, evenly = (
        chosen.to(logits.dtype) / chosen.sum(1, keepdim=True) for chosen in (right, counted)
    )
    targets = (1 - label_smoothing) * right + label_smoothing * evenly
    rows, columns = (
        -(targets * side.masked_fill(~counted, -1e30).log_softmax(1)).masked_fill(~counted, 0).sum()
        for side in (logits, logits.T)
    )
    return (rows + columns) / (2 * len(image)), *hits
