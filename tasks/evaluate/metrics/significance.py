"""Two models on the same samples: how far apart they are, and whether that is chance.

Covers: differences of every figure, their intervals and p-values.
Not here: the statistics (evaclip_model.zeroshot.statistics), figures of one model (figures.py).

Where a figure counts samples answered right, the samples on which the models differ decide
(McNemar's test); where it weighs them otherwise, or samples come in clusters, a bootstrap that
draws the same images for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from evaclip_model.errors import InputError
from evaclip_model.zeroshot.exact_ranks import Ranking
from evaclip_model.zeroshot.statistics import (
    matched_interval,
    mcnemar,
    mean_average_precision,
    mean_per_class,
    percentile_interval,
    resampled_class_means,
    resampled_means,
    resampled_precisions,
    two_sided_p,
)
from tasks.evaluate.metrics.compute import (
    CLASSIFICATION_KS,
    PRECISIONS,
    RETRIEVAL_KS,
    Scored,
    image_of_caption,
    is_kinetics,
    kinetics_values,
    labels_of,
    positives_of,
)


@dataclass(frozen=True)
class Paired:
    """One figure of two models a and b on the same samples; shares."""

    difference: float
    """That of a less that of b."""
    interval: tuple[float, float]
    """95 %, of the difference."""
    p: float
    """Two-sided: how likely models that are equally good are at least so far apart."""
    test: Literal["McNemar, mid-p", "paired bootstrap"]
    only_a: int | None = None
    """Queries that only a answered right; none where the figure does not count any."""
    only_b: int | None = None
    p_exact: float | None = None
    """McNemar's binomial p, never too small."""


def compare(a: Scored, b: Scored) -> dict[str, Paired]:
    """Every figure of both, by metric.

    Raises:
        InputError: they were not evaluated on the same images and classes.
    """
    if a.evalset.fingerprint != b.evalset.fingerprint:
        raise InputError(
            f"evaluation set '{a.evalset.name}': the two models were not evaluated on the same "
            "images and classes, so their answers cannot be paired: evaluate both again"
        )
    if a.classes is not None and b.classes is not None:
        return _of_classes(a, a.classes, b.classes)
    if a.scores is not None and b.scores is not None:
        return _of_labels(a, a.scores, b.scores)
    if a.texts is None or b.texts is None or a.images is None or b.images is None:
        raise RuntimeError(f"set '{a.evalset.name}' was not ranked")
    found = {f"image_to_text_r{k}": _of_hits(a.texts, b.texts, k) for k in RETRIEVAL_KS}
    owner = image_of_caption(a.evalset)
    for k in RETRIEVAL_KS:
        found[f"text_to_image_r{k}"] = (
            _of_hits(a.images, b.images, k)
            if len(a.images) == len(a.texts)
            else _of_captions(a.images, b.images, k, owner)
        )
    return found


def _of_classes(scored: Scored, a: Ranking, b: Ranking) -> dict[str, Paired]:
    found = {f"top{k}": _of_hits(a, b, k) for k in CLASSIFICATION_KS}
    if is_kinetics(scored.evalset):
        values = kinetics_values(a.ranks) - kinetics_values(b.ranks)
        found["kinetics_mean"] = _bootstrapped(float(values.mean()), resampled_means(values))
    labels = labels_of(scored.evalset)
    values = _differences(a, b, 1)
    found["mean_per_class"] = _bootstrapped(
        mean_per_class(values, labels), resampled_class_means(values, labels), values
    )
    return found


def _of_labels(scored: Scored, a: Tensor, b: Tensor) -> dict[str, Paired]:
    positives = positives_of(scored.evalset)
    found = {}
    for metric, curve in PRECISIONS.items():
        ours, theirs = (mean_average_precision(one, positives, curve) for one in (a, b))
        draws = resampled_precisions(a, positives, curve) - resampled_precisions(
            b, positives, curve
        )
        found[metric] = _bootstrapped(ours - theirs, draws)
    return found


def _of_captions(a: Ranking, b: Ranking, k: int, image: Tensor) -> Paired:
    values = _differences(a, b, k)
    return _bootstrapped(float(values.mean()), resampled_means(values, image), values)


def _of_hits(a: Ranking, b: Ranking, k: int) -> Paired:
    """A figure that counts independent queries with a hit among the first k."""
    values = _differences(a, b, k)
    only_a, only_b = int((values > 0).sum()), int((values < 0).sum())
    test = mcnemar(only_a, only_b)
    return Paired(
        difference=float(values.mean()),
        interval=matched_interval(only_a, only_b, len(values)),
        p=test.mid,
        test="McNemar, mid-p",
        only_a=only_a,
        only_b=only_b,
        p_exact=test.exact,
    )


def _bootstrapped(difference: float, draws: Tensor, values: Tensor | None = None) -> Paired:
    return Paired(
        difference=difference,
        interval=percentile_interval(draws),
        p=two_sided_p(draws),
        test="paired bootstrap",
        only_a=None if values is None else int((values > 0).sum()),
        only_b=None if values is None else int((values < 0).sum()),
    )


def _differences(a: Ranking, b: Ranking, k: int) -> Tensor:
    """Of every query: 1 if only a hits among its first k, -1 if only b, else 0; in fp64."""
    return (a.ranks < k).double() - (b.ranks < k).double()
