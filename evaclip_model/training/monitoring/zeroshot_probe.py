"""Zero-shot classification of a small set (zeroshot/set_layout.py: an image and `KEY.cls` a sample)
while training goes on. Evaluation proper is tasks/evaluate.

Every rank encodes its part of the images and of the prompts. What one gives is gathered by all, so
that no rank ends or goes on alone; a probe stops training for its share of the work, no longer.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from evaclip_model.errors import InputError
from evaclip_model.model.clip import EvaClip
from evaclip_model.reading.image_decoder import UnreadableImageError, decode_image
from evaclip_model.reading.transform import image_transform
from evaclip_model.tokenizer.tokenizer import tokenize
from evaclip_model.training.checkpoint.consensus import Peers
from evaclip_model.training.monitoring.validation import encode_in_blocks
from evaclip_model.zeroshot.exact_ranks import build_classifier, fill_templates, rank_classes
from evaclip_model.zeroshot.imagenet_prompts import PLACEHOLDER
from evaclip_model.zeroshot.set_layout import (
    CLASSNAMES,
    TEMPLATES,
    Span,
    find_image,
    find_tars,
    read_label,
    read_lines,
    read_members,
)
from evaclip_model.zeroshot.statistics import count_hits

BATCH = 64
"""Images of a rank that are encoded at once."""
TEXT_BATCH = 256
"""Prompts of a rank that are encoded at once."""
_LABEL = "cls"


@dataclass(frozen=True)
class ProbeSet:
    """A rank's part of the images, encoded; and all classes."""

    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    images: tuple[bytes, ...]
    labels: tuple[int, ...]


def open_probe(folder: Path, rank: int, ranks: int) -> ProbeSet:
    """Read every image number `rank`, `rank` + `ranks` ... of a set into memory.

    Raises: InputError: the folder holds no such set, or a sample has no image or no class.
    """
    try:
        names, templates, found = _read_index(folder)
    except InputError as error:
        raise InputError(
            f"probe {folder} cannot be read as an evaluation set: {error}; or leave 'probe' out"
        ) from None
    mine = found[rank::ranks]
    return ProbeSet(
        names, templates, tuple(span.read() for span, _ in mine), tuple(label for _, label in mine)
    )


def _read_index(
    folder: Path,
) -> tuple[tuple[str, ...], tuple[str, ...], list[tuple[Span, int]]]:
    names = read_lines(folder / CLASSNAMES, "one class name a line")
    templates = read_lines(folder / TEMPLATES, f"one template with {PLACEHOLDER} a line")
    found: list[tuple[Span, int]] = []
    for tar in find_tars(folder):
        for key, members in read_members(tar).items():
            where = f"{tar}: sample {key}"
            image = find_image(members, where)
            if _LABEL not in members:
                raise InputError(f"{where} has no .{_LABEL} member, which a probe needs")
            label = read_label(members[_LABEL].content, where)
            if label >= len(names):
                raise InputError(
                    f"{where} has label {label}, but {folder / CLASSNAMES} names {len(names)} "
                    "classes, counted from 0"
                )
            found.append((image.span, label))
    return names, templates, found


@torch.no_grad()
def run_probe(model: EvaClip, part: ProbeSet) -> tuple[float, float]:
    """Shares of all ranks' images whose class is first, and among the first five; every rank calls.

    An image that cannot be decoded, or whose feature is not finite, counts as wrong; all do when
    a prompt's feature is not.
    """
    device = model.logit_scale.device
    training = model.training
    model.eval()
    classifier = _build_classifier(model, part)
    right = torch.zeros(3, dtype=torch.float64, device=device)
    # A logit that is not finite would rank every answer first.
    for first in range(0, len(part.images) if classifier.isfinite().all() else 0, BATCH):
        features, labels = _encode_images(
            model, part.images[first : first + BATCH], part.labels[first : first + BATCH]
        )
        if len(labels):
            ranking = rank_classes(features, classifier, labels)
            right += torch.tensor(
                [count_hits(ranking.ranks, 1), count_hits(ranking.ranks, 5), 0.0]
            ).to(right)
    right[2] = len(part.images)
    model.train(training)
    if Peers.every_rank().count > 1:
        dist.all_reduce(right)
    first_right, five_right, total = right.tolist()
    return first_right / max(1.0, total), five_right / max(1.0, total)


def _build_classifier(model: EvaClip, part: ProbeSet) -> Tensor:
    """One unit vector a class [C, E] on the CPU, the same on every rank."""
    prompts = fill_templates(part.classnames, part.templates)
    tokens = tokenize(prompts, model.config.text.context_length)
    features = encode_in_blocks(
        model,
        len(tokens),
        lambda some: model.encode_text(tokens[some], normalize=True),
        TEXT_BATCH,
    )
    return build_classifier(features.cpu(), part.classnames)


def _encode_images(
    model: EvaClip, images: tuple[bytes, ...], labels: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Unit features [n, E] of those that have any, on the CPU, and their labels [n]."""
    transform, pixels, known = image_transform(model), [], []
    for image, label in zip(images, labels, strict=True):
        try:
            pixels.append(transform(decode_image(image)))
            known.append(label)
        except UnreadableImageError:
            continue
    if not pixels:
        return torch.zeros(0, model.config.embed_dim), torch.zeros(0, dtype=torch.long)
    stacked = torch.stack(pixels).to(model.logit_scale.device, model.logit_scale.dtype)
    features = model.encode_image(stacked, normalize=True).float().cpu()
    finite = features.isfinite().all(1)
    return features[finite], torch.tensor(known)[finite]
