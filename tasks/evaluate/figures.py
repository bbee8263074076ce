"""Figures of one model on one set: values, intervals, bounds under ties, chance.

Covers: which metrics a kind of set has, and what is stored about each.
Not here: how ranks are made (evaclip_model.zeroshot), how figures are shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evaclip_model.zeroshot import (
    Ranking,
    chance_of_hit,
    classify,
    clustered_interval,
    hit_rate,
    hits,
    mean_per_class,
    retrieve_images,
    retrieve_texts,
    wilson_interval,
)
from tasks.evaluate.sets import EvalSet

CLASSIFICATION_KS = (1, 5)
RETRIEVAL_KS = (1, 5, 10)
SHOWN = 8
"""First answers kept of every query, for the report."""

Figures = dict[str, Any]
TITLES = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "mean per class",
    **{f"image_to_text_r{k}": f"image → text R@{k}" for k in RETRIEVAL_KS},
    **{f"text_to_image_r{k}": f"text → image R@{k}" for k in RETRIEVAL_KS},
}


@dataclass(frozen=True)
class Scored:
    """Ranks of one model on one set; `classes` or both directions of retrieval are filled."""

    evalset: EvalSet
    classes: Ranking | None = None
    texts: Ranking | None = None
    """Image-to-text, one query per image."""
    images: Ranking | None = None
    """Text-to-image, one query per caption."""

    def rankings(self) -> dict[str, Ranking]:
        """The rankings there are, by the direction of the question."""
        named = {
            "image → class": self.classes,
            "image → text": self.texts,
            "text → image": self.images,
        }
        return {name: ranking for name, ranking in named.items() if ranking is not None}


def labels_of(evalset: EvalSet) -> Tensor:
    """Class of every image [N]."""
    return torch.tensor([sample.label for sample in evalset.samples])


def captions_of(evalset: EvalSet) -> list[str]:
    """All captions of a retrieval set [T], image by image."""
    return [caption for sample in evalset.samples for caption in sample.captions]


def image_of_caption(evalset: EvalSet) -> Tensor:
    """Image of every caption [T]."""
    counts = torch.tensor([len(sample.captions) for sample in evalset.samples])
    return torch.repeat_interleave(torch.arange(len(evalset)), counts)


def score(evalset: EvalSet, images: Tensor, texts: Tensor) -> Scored:
    """Rank images [N, D] against a text classifier [C, D], or captions [T, D] both ways."""
    if evalset.kind == "classification":
        return Scored(evalset, classes=classify(images, texts, labels_of(evalset), SHOWN))
    owner = image_of_caption(evalset)
    return Scored(
        evalset,
        texts=retrieve_texts(images, texts, owner, SHOWN),
        images=retrieve_images(images, texts, owner, SHOWN),
    )


def figures_of(scored: Scored) -> Figures:
    """Metrics by name, with `n`, `intervals` (95 %), `bounds` under ties, and `tied` queries.

    Raises:
        RuntimeError: not every sample of the index was ranked exactly once.
    """
    if scored.classes is not None:
        return _of_classes(scored.evalset, scored.classes)
    if scored.texts is None or scored.images is None:
        raise RuntimeError(f"set '{scored.evalset.name}' was not ranked")
    return _of_retrieval(scored.evalset, scored.texts, scored.images)


def chance_of(evalset: EvalSet) -> dict[str, float]:
    """What random answers reach, by metric."""
    if evalset.kind == "classification":
        classes = len(evalset.classnames)
        values = {f"top{k}": min(1.0, k / classes) for k in CLASSIFICATION_KS}
        return {**values, "mean_per_class": 1 / classes}
    captions = len(captions_of(evalset))
    owned = [len(sample.captions) for sample in evalset.samples]
    to_text = {f"image_to_text_r{k}": chance_of_hit(k, captions, owned) for k in RETRIEVAL_KS}
    to_image = {f"text_to_image_r{k}": min(1.0, k / len(evalset)) for k in RETRIEVAL_KS}
    return {**to_text, **to_image}


def _of_classes(evalset: EvalSet, ranking: Ranking) -> Figures:
    _check_all_ranked(evalset, ranking, len(evalset))
    labels = labels_of(evalset)
    n = len(ranking)
    values: Figures = {f"top{k}": hit_rate(ranking.ranks, k) for k in CLASSIFICATION_KS}
    correct = ranking.ranks < 1
    return {
        **values,
        "mean_per_class": mean_per_class(correct, labels),
        "n": n,
        "classes": len(evalset.classnames),
        "tied": int(ranking.tied.sum()),
        "intervals": {
            f"top{k}": wilson_interval(hits(ranking.ranks, k), n) for k in CLASSIFICATION_KS
        },
        "bounds": {f"top{k}": _bounds(ranking, k) for k in CLASSIFICATION_KS},
    }


def _of_retrieval(evalset: EvalSet, texts: Ranking, images: Ranking) -> Figures:
    owner = image_of_caption(evalset)
    _check_all_ranked(evalset, texts, len(evalset))
    _check_all_ranked(evalset, images, len(owner))
    figures: Figures = {
        "n": len(texts),
        "captions": len(images),
        "tied": int(texts.tied.sum() + images.tied.sum()),
        "intervals": {},
        "bounds": {},
    }
    one_each = len(texts) == len(images)
    for k in RETRIEVAL_KS:
        name = f"image_to_text_r{k}"
        figures[name] = hit_rate(texts.ranks, k)
        figures["intervals"][name] = wilson_interval(hits(texts.ranks, k), len(texts))
        figures["bounds"][name] = _bounds(texts, k)
    for k in RETRIEVAL_KS:
        name = f"text_to_image_r{k}"
        figures[name] = hit_rate(images.ranks, k)
        figures["intervals"][name] = (
            wilson_interval(hits(images.ranks, k), len(images))
            if one_each
            else clustered_interval(images.ranks < k, owner)
        )
        figures["bounds"][name] = _bounds(images, k)
    return figures


def _bounds(ranking: Ranking, k: int) -> tuple[float, float]:
    """Hit rate if all ties were lost, and if all were won."""
    return hit_rate(ranking.worst_ranks, k), hit_rate(ranking.best_ranks, k)


def _check_all_ranked(evalset: EvalSet, ranking: Ranking, expected: int) -> None:
    if len(ranking) != expected:
        raise RuntimeError(
            f"set '{evalset.name}': {len(ranking)} queries ranked, its index holds {expected}"
        )
