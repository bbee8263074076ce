"""Figures from ranks and scores with their uncertainty: rates, class means, precision, tests.

A bootstrap draws samples with replacement. Where a figure depends only on how many samples fall
into each of a few cells (a class, answered right or wrong), the cells' counts are drawn instead,
from the multinomial distribution that drawing samples gives them: the same bootstrap, a thousand
times faster. Draws are seeded: the same input gives the same interval.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""

_SAME = 1e-12
"""Variance below which all draws are the same, but for rounding."""
BOOTSTRAP_DRAWS = 1000
BOOTSTRAP_SEED = 20230327
_WEIGHTS_AT_ONCE = 1 << 22
"""Samples times draws held at once; bounds memory and changes no result."""

Ties = Literal["together", "won", "lost"]
"""Meaning of equal scores: all of them are above the threshold or none is ("together"), or the
right ones come first ("won"), or last ("lost")."""
Curve = Callable[[Tensor, Tensor], Tensor]
"""Right ones so far [..., P] and precision [..., P], at each right one in order -> figure [...]."""


def count_hits(ranks: Tensor, k: int) -> int:
    """Number of queries whose right answer is among the first k."""
    return int((ranks < k).sum())


def hit_rate(ranks: Tensor, k: int) -> float:
    """Share of queries whose right answer is among the first k."""
    return count_hits(ranks, k) / max(1, ranks.numel())


def mean_per_class(values: Tensor, labels: Tensor) -> float:
    """Unweighted mean over the classes that occur of the mean of `values` [N] in each."""
    total = torch.bincount(labels)
    sums = torch.bincount(labels, weights=values.double(), minlength=len(total))
    occurs = total > 0
    return float((sums[occurs] / total[occurs]).mean())


def chance_of_hit(k: int, gallery: int, positives: Sequence[int]) -> float:
    """Expected hit rate of random orders: mean over queries with so many right answers each."""
    k = min(k, gallery)
    of = {m: 1 - math.comb(gallery - m, k) / math.comb(gallery, k) for m in set(positives)}
    return math.fsum(of[m] for m in positives) / len(positives)


def area_under_curve(right: Tensor, precision: Tensor) -> Tensor:
    """Area under the precision-recall curve: mean precision at the right ones. `right` are those
    above each threshold [..., P], rising, `precision` is that of what is above it [..., P]."""
    steps = torch.diff(right, dim=-1, prepend=torch.zeros_like(right[..., :1]))
    return (steps * precision).sum(dim=-1) / right[..., -1]


def eleven_points(right: Tensor, precision: Tensor) -> Tensor:
    """Mean of the best precision at a recall of at least 0, 0.1, ... 1, as VOC 2007 defined it."""
    best = precision.flip(-1).cummax(dim=-1).values.flip(-1)
    total = right[..., -1:]
    # Counts, not quotients: 3 of 10 right ones are a recall of 0.3, which 0.1 * 3 exceeds.
    found = [(10 * right < tenth * total).sum(dim=-1, keepdim=True) for tenth in range(11)]
    return torch.cat([best.gather(-1, place) for place in found], dim=-1).mean(dim=-1)


def average_precisions(
    scores: Tensor, positives: Tensor, curve: Curve = area_under_curve, ties: Ties = "together"
) -> Tensor:
    """Average precision of every class [C], in fp64; not a number for a class without a positive.
    `scores` of every image for every class [N, C] are larger where it is likelier, `positives`
    [N, C] says which classes an image shows."""
    weights = torch.ones(1, len(scores), dtype=torch.float64)
    return torch.cat([figure(weights) for figure in _class_figures(scores, positives, curve, ties)])


def mean_average_precision(
    scores: Tensor, positives: Tensor, curve: Curve = area_under_curve, ties: Ties = "together"
) -> float:
    """Mean of `average_precisions` over the classes that have a positive."""
    return float(average_precisions(scores, positives, curve, ties).nanmean())


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927), 95 %."""
    return (0.0, 1.0) if n == 0 else _score_interval(hits / n, n)


def design_interval(
    value: float,
    draws: Tensor,
    units: float,
    *,
    least: float = 1.0,
    most: float = math.inf,
    more_variance: float = 0.0,
) -> tuple[float, float]:
    """Score interval of a figure in 0 to 1 that is not the share of independent hits, 95 %.

    Wilson's formula with the effective sample size, n = p (1 - p) / variance, as surveys use it for
    shares of clustered samples (Kish 1965; Korn and Graubard 1998): the bootstrap gives the
    variance alone. Unlike the bootstrap's percentiles it has a width at 0, at 1 and at n = 2.

    Args:
        draws: bootstrap draws of the figure [draws].
        units: independent samples, which n is where every draw is the same.
        least, most: bounds of n that the design allows.
        more_variance: of the figure, from what is not drawn.
    """
    variance = float(draws[~draws.isnan()].var(correction=0))
    if units > 1:  # draws of n vary as their mean does with n, not with n - 1
        variance *= units / (units - 1)
    variance += more_variance
    spread = value * (1 - value)
    if variance < _SAME or spread < _SAME:
        return _score_interval(value, units)
    return _score_interval(value, min(max(spread / variance, least), most))


def effective_units(sizes: Tensor) -> float:
    """Number of equal groups that say as much of a mean over all members as `sizes` [G] do."""
    sizes = sizes[sizes > 0].double()
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def effective_samples(sizes: Tensor) -> float:
    """Number of samples in equal classes that say as much of a mean over classes as `sizes` [C]."""
    sizes = sizes[sizes > 0].double()
    return float(len(sizes) ** 2 / (1 / sizes).sum())


def _score_interval(p: float, n: float) -> tuple[float, float]:
    """Wilson's formula for a share p of n samples, which need not be a whole number."""
    z = Z95
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # The bounds are 0 and 1 exactly when nothing or everything hits; rounding must not hide it.
    low = 0.0 if p <= 0 else max(0.0, centre - half)
    high = 1.0 if p >= 1 else min(1.0, centre + half)
    return low, high


def resampled_cells(cells: Tensor, figure: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Bootstrap draws [draws] of a figure of samples that fall into cells [N, m]; it gets distinct
    cells [U, m] and how many samples each draw takes of them [draws, U]."""
    distinct, counts = torch.unique(cells, dim=0, return_counts=True)
    return torch.cat([figure(distinct, drawn) for drawn in _drawn_counts(counts)])


def resampled_means(values: Tensor, cluster: Tensor | None = None) -> Tensor:
    """Bootstrap draws of the mean of `values` [N], whole clusters [N] drawn if given, [draws]: the
    captions of one image succeed and fail together."""
    cluster = torch.arange(len(values)) if cluster is None else cluster
    sums, size = torch.bincount(cluster, weights=values.double()), torch.bincount(cluster).double()
    cells = torch.stack([sums, size], dim=1)[size > 0]
    return resampled_cells(cells, lambda one, drawn: (drawn @ one[:, 0]) / (drawn @ one[:, 1]))


def resampled_class_means(values: Tensor, labels: Tensor) -> Tensor:
    """Bootstrap draws of `mean_per_class`, single samples drawn, [draws]. A class of which a draw
    holds no sample is left out of that draw's mean."""
    levels, level = torch.unique(values.double(), return_inverse=True)
    classes = int(labels.max()) + 1
    counts = torch.bincount(labels * len(levels) + level, minlength=classes * len(levels))
    means = []
    for drawn in _drawn_counts(counts):
        cells = drawn.reshape(len(drawn), classes, len(levels))
        size = cells.sum(dim=2)
        means.append((cells @ levels / size).nanmean(dim=1))
    return torch.cat(means)


def worst_group_share(cells: Tensor, counts: Tensor) -> Tensor:
    """The smallest share of hits of a group, of draws [draws, U] of cells (hit, group) [U, 2]."""
    hits, groups = cells.T
    members = torch.nn.functional.one_hot(groups).double()
    sizes = counts @ members
    shares = (counts * hits) @ members / sizes
    worst: Tensor = shares.masked_fill(sizes == 0, torch.inf).min(dim=1).values
    return worst


def f1_macro(cells: Tensor, counts: Tensor) -> Tensor:
    """F1, mean over the classes that occur, of draws [draws, U] of cells (class given, class)."""
    said, labels = cells.T
    classes = int(torch.maximum(said, labels).max()) + 1
    answered, true = (torch.nn.functional.one_hot(one, classes).double() for one in (said, labels))
    given, there = counts @ answered, counts @ true
    scores = 2 * (counts * (said == labels)) @ true / (given + there)
    mean: Tensor = scores.masked_fill(there == 0, float("nan")).nanmean(dim=1)
    return mean


def resampled_precisions(
    scores: Tensor, positives: Tensor, curve: Curve = area_under_curve
) -> Tensor:
    """Bootstrap draws of `mean_average_precision`, whole images drawn, [draws]: the same for any
    scores [N, C], so that differences between two models are differences on the same draws."""
    figures = list(_class_figures(scores, positives, curve, "together"))
    return torch.cat(
        [
            torch.stack([figure(weights) for figure in figures]).nanmean(dim=0)
            for weights in _drawn_weights(len(scores))
        ]
    )


def percentile_interval(draws: Tensor) -> tuple[float, float]:
    """95 % percentile interval of bootstrap draws."""
    low, high = draws.nanquantile(torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
    return low, high


def two_sided_p(differences: Tensor) -> float:
    """Share of bootstrap draws of a difference on the rarer side of zero, doubled; never below
    2 / (draws + 1): so many draws cannot say more."""
    rarer = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2 * (rarer + 1) / (len(differences) + 1))


def test_mcnemar(only_a: int, only_b: int) -> float:
    """McNemar's test (1947) of samples that only the one, or only the other, answered right: the
    two-sided binomial p with half the weight of the observed outcome, mid-p, which is closer to its
    nominal level (Fagerland, Lydersen and Laake 2013)."""
    n, fewer = only_a + only_b, min(only_a, only_b)
    # Logarithms of binomial probabilities: 2^-n underflows to 0 from n = 1075 on.
    i = torch.arange(fewer + 1, dtype=torch.float64)
    whole = torch.tensor(float(n), dtype=torch.float64)
    logs = torch.lgamma(whole + 1) - torch.lgamma(i + 1) - torch.lgamma(whole - i + 1)
    chances = torch.exp(logs - n * math.log(2))
    return min(1.0, 2 * float(chances.sum()) - float(chances[-1]))


def matched_interval(only_a: float, only_b: float, n: float) -> tuple[float, float]:
    """Interval of the difference of two proportions on the same n samples, 95 %: Wald's with half a
    sample added to each of the four cells (Agresti and Min 2005), which keeps its level where few
    samples differ."""
    if n <= 0:
        return -1.0, 1.0
    more, less = only_a + 0.5, only_b + 0.5
    centre = (more - less) / (n + 2)
    half = Z95 * math.sqrt(more + less - (more - less) ** 2 / (n + 2)) / (n + 2)
    return max(-1.0, centre - half), min(1.0, centre + half)


def _weighted_figure(
    weights: Tensor, images: Tensor, positive: Tensor, ends: Tensor, curve: Curve
) -> Tensor:
    """A class's figure for every row of how often each image counts [draws, N], of `images` by
    falling score, which of them are `positive` [N], and where the threshold of each positive `ends`
    [P]: the last place that it still admits."""
    if not len(ends):
        return torch.full((len(weights),), float("nan"), dtype=torch.float64)
    mine = weights[:, images]
    total = mine.cumsum(dim=1)[:, ends]
    right = (mine * positive).cumsum(dim=1)[:, ends]
    figure = curve(right, right / total.clamp_min(1))
    return figure.masked_fill(right[:, -1] == 0, float("nan"))


def _class_figures(
    scores: Tensor, positives: Tensor, curve: Curve, ties: Ties
) -> Iterator[Callable[[Tensor], Tensor]]:
    """`_weighted_figure` of every class, with its order of images."""
    for column, positive in zip(scores.float().T, positives.T, strict=True):
        first = {"together": 0, "won": -1, "lost": 1}[ties] * positive.int()
        by_tie = first.sort(stable=True).indices
        images = by_tie[column[by_tie].sort(descending=True, stable=True).indices]
        ends = torch.arange(len(images))
        if ties == "together":
            _, sizes = torch.unique_consecutive(column[images], return_counts=True)
            ends = (sizes.cumsum(dim=0) - 1).repeat_interleave(sizes)
        mine = positive[images]
        order = {"images": images, "positive": mine.double(), "ends": ends[mine.bool()]}
        yield partial(_weighted_figure, curve=curve, **order)


def _drawn_counts(counts: Tensor) -> Iterator[Tensor]:
    """Samples that each draw takes from cells that hold `counts` [cells]: [draws, cells]."""
    n = int(counts.sum())
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    shares = counts.double().numpy() / n
    for draws in _iterate_portions(len(counts)):
        yield torch.from_numpy(generator.multinomial(n, shares, size=draws)).double()


def _drawn_weights(n: int) -> Iterator[Tensor]:
    """Number of times that each draw takes each of n samples: [draws, n]."""
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    for draws in _iterate_portions(n):
        rows = [np.bincount(generator.integers(0, n, n), minlength=n) for _ in range(draws)]
        yield torch.from_numpy(np.stack(rows)).double()


def _iterate_portions(width: int) -> Iterator[int]:
    """All draws in portions of at most `_WEIGHTS_AT_ONCE` numbers."""
    at_once = max(1, _WEIGHTS_AT_ONCE // max(1, width))
    for start in range(0, BOOTSTRAP_DRAWS, at_once):
        yield min(at_once, BOOTSTRAP_DRAWS - start)
