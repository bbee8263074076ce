"""The table of docs/evaluate.md: how often the 95 % intervals hold the truth, by simulation.

Three figures of n images of which a share p is right: top-1; captions, five an image, that share
an image's luck (beta-distributed, correlation 1/3 within an image); the mean over ten classes.
Beside each, but top-1, the percentiles of the bootstrap alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from evaclip_model.zeroshot.exact_ranks import Ranking, rank_targets
from evaclip_model.zeroshot.statistics import (
    percentile_interval,
    resampled_class_means,
    resampled_means,
)
from tasks.evaluate.metrics.metric import METRICS
from tasks.evaluate.metrics.scored import Scored
from tasks.evaluate.sets.published_layout import EvalSet
from tests.tasks.evaluate.answers import caption_set, class_set

SIZES, SHARES = (2, 10, 100, 10_000), (0.01, 0.5, 0.99)
CLASSES, CAPTIONS = 10, 5
Interval = tuple[float, float]
BY_NAME = {metric.name: metric for metric in METRICS}


def simulate(n: int, p: float, times: int, draw: np.random.Generator) -> dict[str, list[Interval]]:
    """Figure -> its interval in each of so many evaluations."""
    found: dict[str, list[Interval]] = {}
    captions = caption_set([CAPTIONS] * n)
    owner = torch.arange(n).repeat_interleave(CAPTIONS)
    for _ in range(times):
        labels = torch.from_numpy(draw.integers(0, CLASSES, n))
        hits = torch.from_numpy(draw.random(n) < p)
        classes = score_classes(labels, hits)
        luck = draw.beta(2 * p, 2 * (1 - p), n)
        told = torch.from_numpy(draw.random(n * CAPTIONS) < np.repeat(luck, CAPTIONS))
        texts = Scored(captions, images=rank_hits(told))
        for name, interval in {
            "top-1": BY_NAME["top1"].compute_interval(classes),
            "captions": BY_NAME["text_to_image_r1"].compute_interval(texts),
            "captions, percentiles": percentile_interval(resampled_means(told.double(), owner)),
            "classes": BY_NAME["mean_per_class"].compute_interval(classes),
            "classes, percentiles": percentile_interval(
                resampled_class_means(hits.double(), labels)
            ),
        }.items():
            found.setdefault(name, []).append(interval)
    return found


def score_classes(labels: torch.Tensor, hits: torch.Tensor) -> Scored:
    evalset: EvalSet = class_set(labels.tolist(), [str(one) for one in range(CLASSES)])
    return Scored(evalset, classes=rank_hits(hits))


def rank_hits(hits: torch.Tensor) -> Ranking:
    """A ranking whose first answer is right where there is a hit."""
    logits = torch.stack([hits.float(), 1 - hits.float()], dim=1)
    return rank_targets(logits, torch.zeros(len(hits), dtype=torch.long), 1)


def describe(intervals: Sequence[Interval], p: float) -> str:
    """Share of the intervals that hold p, and their mean width."""
    held = np.mean([low <= p <= high for low, high in intervals])
    width = np.mean([high - low for low, high in intervals])
    return f"{held:.2f} ({width:.2g})"


def list_rows() -> Iterator[list[str]]:
    draw = np.random.default_rng(7)
    for n in SIZES:
        for p in SHARES:
            found = simulate(n, p, 200 if n < 10_000 else 60, draw)
            yield [f"{n:,}", f"{p:g}", *(describe(one, p) for one in found.values())]


if __name__ == "__main__":
    names = ("n images", "p", "top-1", "captions, 5 an image: score", "percentiles")
    print(f"| {' | '.join((*names, 'mean over 10 classes: score', 'percentiles'))} |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    for row in list_rows():
        print(f"| {' | '.join(row)} |", flush=True)
