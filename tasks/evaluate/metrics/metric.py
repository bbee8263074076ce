"""The list of metrics, of which everything that is said of a figure derives.

Covers: a metric (values of single samples, figure, interval, bounds under ties, paired test, chance
level, place in reports and in the paper's tables), the ways to estimate one, the list.
Not here: the statistics themselves (evaclip_model/zeroshot/statistics.py), the figures of a model
on a set (compute.py).

A new metric is one entry of `METRICS`. Its name is a key of `results.json`, of the counts of the
artifact and so of MLflow; tables show metrics in the order of the list.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from evaclip_model.zeroshot.exact_ranks import Ranking
from evaclip_model.zeroshot.statistics import (
    Curve,
    Ties,
    area,
    chance_of_hit,
    eleven_points,
    matched_interval,
    mcnemar,
    mean_average_precision,
    mean_per_class,
    percentile_interval,
    resampled_class_means,
    resampled_means,
    resampled_precisions,
    two_sided_p,
    wilson_interval,
)
from tasks.evaluate.metrics.scored import (
    Scored,
    captions_of,
    image_of_caption,
    labels_of,
    positives_of,
)
from tasks.evaluate.sets.published_layout import EvalSet
from tasks.evaluate.sets.set_registry import Kind, KnownSet, PaperMetric

Interval = tuple[float, float]
PerSample = Callable[[Scored, Ties], Tensor]
"""Values of the queries of a set [Q] if ties are broken by index ("together"), won or lost."""


@dataclass(frozen=True)
class PairedDifference:
    """One figure of two models a and b on the same samples; shares."""

    difference: float
    """That of a less that of b."""
    interval: Interval
    """95 %, of the difference."""
    p: float
    """Two-sided: how likely models that are equally good are at least so far apart."""
    test: Literal["McNemar, mid-p", "paired bootstrap"]
    only_a: int | None = None
    """Queries that only a answered right; None where the figure counts none."""
    only_b: int | None = None
    p_exact: float | None = None
    """McNemar's binomial p, never too small."""


class Estimate(ABC):
    """How a figure, its interval and its paired test follow from a model's answers."""

    @abstractmethod
    def value(self, scored: Scored, ties: Ties = "together") -> float:
        """The figure, a share of 1."""

    @abstractmethod
    def interval(self, scored: Scored) -> Interval:
        """Its 95 % interval."""

    @abstractmethod
    def compare(self, a: Scored, b: Scored) -> PairedDifference:
        """The figure of a less that of b, on the same samples."""


@dataclass(frozen=True)
class HitShare(Estimate):
    """Share of queries answered right.

    Independent queries have Wilson's interval and McNemar's test. Queries that succeed and fail
    together, such as the captions of one image, are drawn a whole cluster at a time in a bootstrap.
    """

    per_sample: PerSample
    """1 or true: right."""
    cluster: Callable[[EvalSet], Tensor] | None = None
    """Cluster of every query [Q]."""

    def value(self, scored: Scored, ties: Ties = "together") -> float:
        hits = self.per_sample(scored, ties)
        return int(hits.sum()) / max(1, len(hits))

    def interval(self, scored: Scored) -> Interval:
        hits, cluster = self.per_sample(scored, "together"), self._clusters(scored)
        if cluster is None:
            return wilson_interval(int(hits.sum()), len(hits))
        return percentile_interval(resampled_means(hits, cluster))

    def compare(self, a: Scored, b: Scored) -> PairedDifference:
        values, cluster = _differences(self.per_sample, a, b), self._clusters(a)
        difference = float(values.mean())
        if cluster is not None:
            return _bootstrapped(difference, resampled_means(values, cluster), values)
        only_a, only_b = int((values > 0).sum()), int((values < 0).sum())
        test = mcnemar(only_a, only_b)
        return PairedDifference(
            difference,
            matched_interval(only_a, only_b, len(values)),
            test.mid,
            "McNemar, mid-p",
            only_a,
            only_b,
            test.exact,
        )

    def _clusters(self, scored: Scored) -> Tensor | None:
        """Clusters, unless each holds one query."""
        if self.cluster is None:
            return None
        clusters = self.cluster(scored.evalset)
        return clusters if len(torch.unique(clusters)) < len(clusters) else None


@dataclass(frozen=True)
class SampleMean(Estimate):
    """Mean of values of any size over samples, with a bootstrap over them."""

    per_sample: PerSample

    def value(self, scored: Scored, ties: Ties = "together") -> float:
        return float(self.per_sample(scored, ties).mean())

    def interval(self, scored: Scored) -> Interval:
        return percentile_interval(resampled_means(self.per_sample(scored, "together")))

    def compare(self, a: Scored, b: Scored) -> PairedDifference:
        values = _differences(self.per_sample, a, b)
        return _bootstrapped(float(values.mean()), resampled_means(values))


@dataclass(frozen=True)
class ClassMean(Estimate):
    """Share of hits in each class, then the mean over classes, with a bootstrap over samples."""

    per_sample: PerSample

    def value(self, scored: Scored, ties: Ties = "together") -> float:
        return mean_per_class(self.per_sample(scored, ties), labels_of(scored.evalset))

    def interval(self, scored: Scored) -> Interval:
        hits = self.per_sample(scored, "together")
        return percentile_interval(resampled_class_means(hits, labels_of(scored.evalset)))

    def compare(self, a: Scored, b: Scored) -> PairedDifference:
        values, labels = _differences(self.per_sample, a, b), labels_of(a.evalset)
        draws = resampled_class_means(values, labels)
        return _bootstrapped(mean_per_class(values, labels), draws, values)


@dataclass(frozen=True)
class MeanPrecision(Estimate):
    """Average precision of each class, then the mean over classes, with a bootstrap over images.

    It ranks images against each other, so no single image has a value of its own.
    """

    curve: Curve

    def value(self, scored: Scored, ties: Ties = "together") -> float:
        positives = positives_of(scored.evalset)
        return mean_average_precision(_scores(scored), positives, self.curve, ties)

    def interval(self, scored: Scored) -> Interval:
        return percentile_interval(self._draws(scored))

    def compare(self, a: Scored, b: Scored) -> PairedDifference:
        # Equal seeds draw the same images for both.
        return _bootstrapped(self.value(a) - self.value(b), self._draws(a) - self._draws(b))

    def _draws(self, scored: Scored) -> Tensor:
        return resampled_precisions(_scores(scored), positives_of(scored.evalset), self.curve)


@dataclass(frozen=True)
class Metric:
    """One figure that evaluation sets of a kind have, and everything that is told of it."""

    name: str
    """Key in `results.json` and in MLflow."""
    title: str
    """Name for people."""
    kind: Kind
    """Kind of the sets that have it."""
    estimate: Estimate
    chance: Callable[[EvalSet], float] | None = None
    """What random answers reach; None where that is not known."""
    printed_for: PaperMetric | None = None
    """Metric, as the registry names it, of the sets of which the paper prints this figure."""
    column: str = ""
    """Column of the paper's tables that prints it, of a registry entry's `key` and `column`."""
    headline: int = 0
    """Place among the figures shown first of those sets, which the gate judges; 0: none."""
    is_theirs_alone: bool = False
    """Whether only those sets have it, not every set of the kind."""

    def applies_to(self, evalset: EvalSet) -> bool:
        """Whether a set has this figure."""
        named = evalset.known.metric if evalset.known else None
        return evalset.kind == self.kind and (not self.is_theirs_alone or named == self.printed_for)

    def value(self, scored: Scored) -> float:
        """The figure of a model on a set, a share of 1."""
        return self.estimate.value(scored)

    def interval(self, scored: Scored) -> Interval:
        """Its 95 % interval."""
        return self.estimate.interval(scored)

    def bounds(self, scored: Scored) -> Interval:
        """The figure if all ties were lost, and if all were won.

        Images that tie count as one threshold of a precision, which may be worth more than any
        order of them: the figure itself is never outside.
        """
        value, lost, won = (self.estimate.value(scored, one) for one in _TIES)
        return min(value, lost), max(value, won)

    def compare(self, a: Scored, b: Scored) -> PairedDifference:
        """The figure of a less that of b, on the same samples."""
        return self.estimate.compare(a, b)


def _ranks(ranking: Ranking | None, ties: Ties) -> Tensor:
    """Ranks [Q] of the right answers under a rule for ties."""
    assert ranking is not None, "Scored.check_complete comes first"
    by_rule = {
        "together": ranking.ranks,
        "won": ranking.best_ranks,
        "lost": ranking.worst_ranks,
    }
    return by_rule[ties]


def _scores(scored: Scored) -> Tensor:
    assert scored.scores is not None, "Scored.check_complete comes first"
    return scored.scores


def _class_in_first(k: int) -> PerSample:
    return lambda scored, ties: _ranks(scored.classes, ties) < k


def _mean_of_top1_and_top5(scored: Scored, ties: Ties) -> Tensor:
    ranks = _ranks(scored.classes, ties)
    return ((ranks < 1).double() + (ranks < 5).double()) / 2


def _differences(per_sample: PerSample, a: Scored, b: Scored) -> Tensor:
    """Value of a less that of b of every query [Q], in fp64."""
    return per_sample(a, "together").double() - per_sample(b, "together").double()


def _bootstrapped(difference: float, draws: Tensor, hits: Tensor | None = None) -> PairedDifference:
    """A difference from bootstrap draws of it; `hits` [Q] are 1, 0 and -1 of what counts hits."""
    return PairedDifference(
        difference,
        percentile_interval(draws),
        two_sided_p(draws),
        "paired bootstrap",
        None if hits is None else int((hits > 0).sum()),
        None if hits is None else int((hits < 0).sum()),
    )


def _chance_of_class(k: int) -> Callable[[EvalSet], float]:
    return lambda evalset: min(1.0, k / len(evalset.classnames))


def _chance_of_precision(evalset: EvalSet) -> float:
    """Mean share of positives: of scores that know nothing, every threshold's precision is that."""
    shares = positives_of(evalset).double().mean(dim=0)
    return float(shares[shares > 0].mean())


def define_top(k: int, **more: Any) -> Metric:
    return Metric(
        f"top{k}",
        f"top-{k}",
        "classification",
        HitShare(_class_in_first(k)),
        _chance_of_class(k),
        **more,
    )


def define_image_to_text(k: int, headline: int = 0) -> Metric:
    return Metric(
        f"image_to_text_r{k}",
        f"image → text R@{k}",
        "retrieval",
        HitShare(lambda scored, ties: _ranks(scored.texts, ties) < k),
        lambda evalset: chance_of_hit(
            k, len(captions_of(evalset)), [len(sample.captions) for sample in evalset.samples]
        ),
        printed_for="retrieval",
        column=f"{{key}}_text_r{k}",
        headline=headline,
    )


def define_text_to_image(k: int, headline: int = 0) -> Metric:
    return Metric(
        f"text_to_image_r{k}",
        f"text → image R@{k}",
        "retrieval",
        HitShare(lambda scored, ties: _ranks(scored.images, ties) < k, image_of_caption),
        lambda evalset: min(1.0, k / len(evalset)),
        printed_for="retrieval",
        column=f"{{key}}_image_r{k}",
        headline=headline,
    )


_TIES: tuple[Ties, ...] = ("together", "lost", "won")
METRICS = (
    define_top(1, printed_for="top1", column="{column}", headline=1),
    define_top(5),
    Metric(
        "kinetics_mean",
        "mean of top-1 and top-5",
        "classification",
        SampleMean(_mean_of_top1_and_top5),
        lambda evalset: (_chance_of_class(1)(evalset) + _chance_of_class(5)(evalset)) / 2,
        printed_for="kinetics_mean",
        column="{column}",
        headline=1,
        is_theirs_alone=True,
    ),
    Metric(
        "mean_per_class",
        "mean per class",
        "classification",
        ClassMean(_class_in_first(1)),
        lambda evalset: 1 / len(evalset.classnames),
    ),
    Metric(
        "map",
        "mAP",
        "multilabel",
        MeanPrecision(area),
        _chance_of_precision,
        printed_for="map",
        headline=1,
    ),
    Metric(
        "map_11pt",
        "mAP, 11 points",
        "multilabel",
        MeanPrecision(eleven_points),
        _chance_of_precision,
    ),
    define_image_to_text(1, headline=2),
    define_image_to_text(5),
    define_image_to_text(10),
    define_text_to_image(1, headline=1),
    define_text_to_image(5),
    define_text_to_image(10),
)
"""Every metric, in the order in which figures are shown."""


def metrics_of(evalset: EvalSet) -> list[Metric]:
    """The metrics of a set."""
    return [metric for metric in METRICS if metric.applies_to(evalset)]


def metrics_in(figures: Mapping[str, Any]) -> list[Metric]:
    """The metrics of which there is a figure."""
    return [metric for metric in METRICS if metric.name in figures]


def headlines_of(kind: Kind, named: PaperMetric | None) -> list[Metric]:
    """The figures of a set that are shown first.

    Args:
        kind: of the set.
        named: its metric in the registry; None of a set that is not there, which is taken for
            one of those that all sets of its kind are like.
    """
    first = [one for one in METRICS if one.kind == kind and one.headline]
    named = named or next(one.printed_for for one in first if not one.is_theirs_alone)
    return sorted(
        (one for one in first if one.printed_for == named), key=lambda metric: metric.headline
    )


def printed_columns(known: KnownSet) -> dict[str, str]:
    """Column of the paper's tables -> name of our figure that it prints; none of a variant."""
    if not known.tables:
        return {}
    return {
        one.column.format(key=known.key, column=known.column): one.name
        for one in METRICS
        if one.column and one.printed_for == known.metric
    }


def title_of(name: str) -> str:
    """A metric's name for people."""
    return next((one.title for one in METRICS if one.name == name), name.replace("_", " "))


def judged_metrics() -> tuple[str, ...]:
    """Names of the figures that are shown first of some set, which the gate judges."""
    return tuple(one.name for one in METRICS if one.headline)
