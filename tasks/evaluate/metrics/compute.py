"""Figures of one model on one set: values, intervals, bounds under ties, chance.

Covers: which metrics a kind of set has, and what is stored about each.
Not here: how ranks are made (evaclip_model.zeroshot.exact_ranks), what they amount to
(evaclip_model.zeroshot.statistics),
two models on one set (paired.py), how figures are shown.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evaclip_model.zeroshot.exact_ranks import (
    Ranking,
    class_scores,
    classify,
    retrieve_images,
    retrieve_texts,
)
from evaclip_model.zeroshot.statistics import (
    area,
    average_precisions,
    chance_of_hit,
    eleven_points,
    hit_rate,
    hits,
    mean_average_precision,
    mean_per_class,
    percentile_interval,
    resampled_class_means,
    resampled_means,
    resampled_precisions,
    wilson_interval,
)
from tasks.evaluate.sets.published_layout import EvalSet

CLASSIFICATION_KS = (1, 5)
RETRIEVAL_KS = (1, 5, 10)
SHOWN = 8
"""First answers kept of every query, for the report."""
CONFUSIONS = 20
"""Commonest mistakes that are written down."""
PRECISIONS = {"map": area, "map_11pt": eleven_points}
"""Metrics of a multi-label set."""

Figures = dict[str, Any]
TITLES = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "mean per class",
    "kinetics_mean": "mean of top-1 and top-5",
    "map": "mAP",
    "map_11pt": "mAP, 11 points",
    **{f"image_to_text_r{k}": f"image → text R@{k}" for k in RETRIEVAL_KS},
    **{f"text_to_image_r{k}": f"text → image R@{k}" for k in RETRIEVAL_KS},
}


@dataclass(frozen=True)
class Scored:
    """What one model answers on one set; filled is what the kind of the set calls for."""

    evalset: EvalSet
    classes: Ranking | None = None
    """Of a classification set."""
    texts: Ranking | None = None
    """Image-to-text, one query per image."""
    images: Ranking | None = None
    """Text-to-image, one query per caption."""
    scores: Tensor | None = None
    """Of a multi-label set: fp32 logits [N, C]."""

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


def positives_of(evalset: EvalSet) -> Tensor:
    """Which classes every image of a multi-label set shows [N, C]."""
    shown = torch.zeros(len(evalset), len(evalset.classnames), dtype=torch.bool)
    for row, sample in enumerate(evalset.samples):
        shown[row, list(sample.labels)] = True
    return shown


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
    if evalset.kind == "multilabel":
        return Scored(evalset, scores=class_scores(images, texts))
    owner = image_of_caption(evalset)
    return Scored(
        evalset,
        texts=retrieve_texts(images, texts, owner, SHOWN),
        images=retrieve_images(images, texts, owner, SHOWN),
    )


def figures_of(scored: Scored) -> Figures:
    """Metrics by name, with `n`, `intervals` (95 %), `bounds` under ties, and `tied` queries.

    Of classes also `per_class`, and of one class an image the commonest `confusions`: the true
    class, the one given, how often.

    Raises:
        RuntimeError: not every sample of the index was ranked exactly once.
    """
    if scored.classes is not None:
        return _of_classes(scored.evalset, scored.classes)
    if scored.scores is not None:
        return _of_labels(scored.evalset, scored.scores)
    if scored.texts is None or scored.images is None:
        raise RuntimeError(f"set '{scored.evalset.name}' was not ranked")
    return _of_retrieval(scored.evalset, scored.texts, scored.images)


def chance_of(evalset: EvalSet) -> dict[str, float]:
    """What random answers reach, by metric."""
    if evalset.kind == "classification":
        classes = len(evalset.classnames)
        values = {f"top{k}": min(1.0, k / classes) for k in CLASSIFICATION_KS}
        if is_kinetics(evalset):
            values["kinetics_mean"] = sum(values.values()) / len(values)
        return {**values, "mean_per_class": 1 / classes}
    if evalset.kind == "multilabel":
        # Of scores that know nothing, every threshold's precision is the class's share of images.
        shares = positives_of(evalset).double().mean(dim=0)
        return dict.fromkeys(PRECISIONS, float(shares[shares > 0].mean()))
    captions = len(captions_of(evalset))
    owned = [len(sample.captions) for sample in evalset.samples]
    to_text = {f"image_to_text_r{k}": chance_of_hit(k, captions, owned) for k in RETRIEVAL_KS}
    to_image = {f"text_to_image_r{k}": min(1.0, k / len(evalset)) for k in RETRIEVAL_KS}
    return {**to_text, **to_image}


def _of_classes(evalset: EvalSet, ranking: Ranking) -> Figures:
    _check_all_ranked(evalset, len(ranking), len(evalset))
    labels, n = labels_of(evalset), len(ranking)
    figures: Figures = {
        "n": n,
        "classes": len(evalset.classnames),
        "tied": int(ranking.tied.sum()),
        "intervals": {},
        "bounds": {},
    }
    for k in CLASSIFICATION_KS:
        figures[f"top{k}"] = hit_rate(ranking.ranks, k)
        figures["intervals"][f"top{k}"] = wilson_interval(hits(ranking.ranks, k), n)
        figures["bounds"][f"top{k}"] = _bounds(ranking, k)
    if is_kinetics(evalset):
        figures["kinetics_mean"] = float(kinetics_values(ranking.ranks).mean())
        draws = resampled_means(kinetics_values(ranking.ranks))
        figures["intervals"]["kinetics_mean"] = percentile_interval(draws)
        figures["bounds"]["kinetics_mean"] = (
            float(kinetics_values(ranking.worst_ranks).mean()),
            float(kinetics_values(ranking.best_ranks).mean()),
        )
    correct, lost, won = (
        ranks < 1 for ranks in (ranking.ranks, ranking.worst_ranks, ranking.best_ranks)
    )
    figures["mean_per_class"] = mean_per_class(correct, labels)
    draws = resampled_class_means(correct, labels)
    figures["intervals"]["mean_per_class"] = percentile_interval(draws)
    figures["bounds"]["mean_per_class"] = (
        mean_per_class(lost, labels),
        mean_per_class(won, labels),
    )
    figures["per_class"] = _per_class(evalset, correct, labels)
    figures["confusions"] = _confusions(evalset, ranking, labels)
    return figures


def _of_labels(evalset: EvalSet, scores: Tensor) -> Figures:
    _check_all_ranked(evalset, len(scores), len(evalset))
    positives = positives_of(evalset)
    figures: Figures = {
        "n": len(scores),
        "classes": len(evalset.classnames),
        "positives": int(positives.sum()),
        "tied": _images_tied(scores, positives),
        "intervals": {},
        "bounds": {},
    }
    for metric, curve in PRECISIONS.items():
        figures[metric] = mean_average_precision(scores, positives, curve)
        draws = resampled_precisions(scores, positives, curve)
        figures["intervals"][metric] = percentile_interval(draws)
        lost, won = (
            mean_average_precision(scores, positives, curve, ties) for ties in ("lost", "won")
        )
        # Images that tie are one threshold, which may be worth more than any order of them.
        figures["bounds"][metric] = (min(lost, figures[metric]), max(won, figures[metric]))
    counts = positives.sum(dim=0).tolist()
    precisions = average_precisions(scores, positives).tolist()
    figures["per_class"] = [
        {"name": name, "n": n, "average_precision": precision if n else None}
        for name, n, precision in zip(evalset.classnames, counts, precisions, strict=True)
    ]
    return figures


def _of_retrieval(evalset: EvalSet, texts: Ranking, images: Ranking) -> Figures:
    owner = image_of_caption(evalset)
    _check_all_ranked(evalset, len(texts), len(evalset))
    _check_all_ranked(evalset, len(images), len(owner))
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
            else percentile_interval(resampled_means(images.ranks < k, owner))
        )
        figures["bounds"][name] = _bounds(images, k)
    return figures


def is_kinetics(evalset: EvalSet) -> bool:
    """Whether the set is one of those whose figure is the mean of top-1 and top-5."""
    return evalset.known is not None and evalset.known.metric == "kinetics_mean"


def kinetics_values(ranks: Tensor) -> Tensor:
    """What every clip adds to the mean of top-1 and top-5 [N], in fp64."""
    return torch.stack([(ranks < k).double() for k in CLASSIFICATION_KS]).mean(dim=0)


def _bounds(ranking: Ranking, k: int) -> tuple[float, float]:
    """Hit rate if all ties were lost, and if all were won."""
    return hit_rate(ranking.worst_ranks, k), hit_rate(ranking.best_ranks, k)


def _per_class(evalset: EvalSet, correct: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """How many images of each class there are, and how many were answered right."""
    classes = len(evalset.classnames)
    counts = torch.bincount(labels, minlength=classes).tolist()
    right = torch.bincount(labels[correct], minlength=classes).tolist()
    return [
        {"name": name, "n": n, "correct": hit, "share": hit / n if n else None}
        for name, n, hit in zip(evalset.classnames, counts, right, strict=True)
    ]


def _confusions(evalset: EvalSet, ranking: Ranking, labels: Tensor) -> list[list[Any]]:
    """The commonest mistakes: true class, given class, times."""
    given, names = ranking.top[:, 0], evalset.classnames
    wrong = ranking.ranks > 0
    pairs = Counter(zip(labels[wrong].tolist(), given[wrong].tolist(), strict=True))
    return [[names[true], names[said], n] for (true, said), n in pairs.most_common(CONFUSIONS)]


def _images_tied(scores: Tensor, positives: Tensor) -> int:
    """Images that share a class's score with one of the other truth."""
    tied = torch.zeros(len(scores), dtype=torch.bool)
    for column, positive in zip(scores.T, positives.T, strict=True):
        _, place = torch.unique(column, return_inverse=True)
        right = torch.bincount(place, weights=positive.double())[place]
        tied |= (right > 0) & (right < torch.bincount(place)[place])
    return int(tied.sum())


def _check_all_ranked(evalset: EvalSet, ranked: int, expected: int) -> None:
    if ranked != expected:
        raise RuntimeError(
            f"set '{evalset.name}': {ranked} queries ranked, its index holds {expected}"
        )
