"""The list of metrics, of which everything that is said of a figure derives.

A new metric is one entry of `METRICS`. Its name is a key of `results.json`, of the counts of the
artifact and so of MLflow; tables show metrics in the order of the list.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from evaclip_model.zeroshot import statistics as stats
from evaclip_model.zeroshot.exact_ranks import Ranking
from evaclip_model.zeroshot.statistics import Curve, Ties
from tasks.evaluate.metrics import scored as forms
from tasks.evaluate.metrics.scored import Scored
from tasks.evaluate.sets.choice_questions import Form, Question
from tasks.evaluate.sets.published_layout import EvalSet
from tasks.evaluate.sets.set_registry import Kind, KnownSet, PaperMetric

_SAME = 1e-12
"""Width of an interval below which all draws are the same, but for rounding."""
Interval = tuple[float, float]


@dataclass(frozen=True)
class PairedDifference:
    """One figure of model a less that of b on the same samples; shares."""

    difference: float
    interval: Interval
    """95 %, of the difference."""
    p: float
    """Two-sided: how likely models that are equally good are at least so far apart."""
    test: Literal["McNemar, mid-p", "paired bootstrap"]
    only_a: int | None = None
    """Queries that only a answered right; None where the figure counts none."""
    only_b: int | None = None


@dataclass(frozen=True, kw_only=True)
class Metric(ABC):
    """One figure that evaluation sets of a kind have, and all that derives from it."""

    name: str
    """Key in `results.json` and in MLflow."""
    title: str
    kind: Kind
    """Of the sets that have it."""
    chance: Callable[[EvalSet], float] | None = None
    """Share that random answers reach; None where it is not known."""
    printed_for: PaperMetric | None = None
    """Metric, as the registry names it, of the sets of which the paper prints this figure."""
    column: str = ""
    """Column of the paper's tables that prints it, of a registry entry's `key` and `column`."""
    headline: int = 0
    """Place among the figures shown first of those sets, which the gate judges; 0: none."""
    is_theirs_alone: bool = False
    """True: only those sets have it, not every set of the kind."""
    has_it: Callable[[EvalSet], bool] = lambda evalset: True
    """Of a set of the kind."""

    @abstractmethod
    def compute_value(self, scored: Scored, ties: Ties = "together") -> float:
        """The figure of a model on a set, a share of 1."""

    @abstractmethod
    def compute_interval(self, scored: Scored) -> Interval: ...

    @abstractmethod
    def compare_models(self, a: Scored, b: Scored) -> PairedDifference: ...

    def tie_bounds(self, scored: Scored, value: float) -> Interval:
        """The figure if all ties were lost, and if all were won; `value` is the figure itself.

        Images that tie count as one threshold of a precision, which may be worth more than any
        order of them: the figure itself is never outside.
        """
        lost, won = self.compute_value(scored, "lost"), self.compute_value(scored, "won")
        return min(value, lost), max(value, won)

    def applies_to(self, evalset: EvalSet) -> bool:
        named = evalset.known.metric if evalset.known else None
        alone = self.is_theirs_alone or named == "real_top1"
        is_one = evalset.kind == self.kind and self.has_it(evalset)
        return is_one and (not alone or named == self.printed_for)


@dataclass(frozen=True, kw_only=True)
class SampleMetric(Metric):
    """A metric of which every query has a value of its own."""

    per_sample: Callable[[Scored, Ties], Tensor]
    """Values of the queries [Q] if ties are broken by index ("together"), won or lost."""
    counts_hits: ClassVar[bool] = True

    def _sample_values(self, scored: Scored, ties: Ties = "together") -> Tensor:
        return self.per_sample(scored, ties).double()

    def _average(self, values: Tensor, evalset: EvalSet) -> float:
        """The figure of values [Q], or of differences of values."""
        return float(values.mean())

    def _draw_averages(self, values: Tensor, evalset: EvalSet) -> Tensor:
        return stats.resampled_means(values)

    def compute_value(self, scored: Scored, ties: Ties = "together") -> float:
        return self._average(self._sample_values(scored, ties), scored.evalset)

    def compare_models(self, a: Scored, b: Scored) -> PairedDifference:
        values, evalset = self._sample_values(a) - self._sample_values(b), a.evalset
        difference, draws = self._average(values, evalset), self._draw_averages(values, evalset)
        units = len(evalset.questions or evalset)
        return _bootstrap_difference(difference, draws, units, values if self.counts_hits else None)


class HitShare(SampleMetric):
    """Share of independent queries answered right: Wilson's interval, McNemar's test."""

    def compute_interval(self, scored: Scored) -> Interval:
        hits = self._sample_values(scored)
        return stats.wilson_interval(int(hits.sum()), len(hits))

    def compare_models(self, a: Scored, b: Scored) -> PairedDifference:
        values = self._sample_values(a) - self._sample_values(b)
        only_a, only_b = int((values > 0).sum()), int((values < 0).sum())
        p = stats.test_mcnemar(only_a, only_b)
        interval = stats.matched_interval(only_a, only_b, len(values))
        return PairedDifference(float(values.mean()), interval, p, "McNemar, mid-p", only_a, only_b)


class CaptionHitShare(HitShare):
    """Share of captions answered right. Those of one image succeed and fail together, so that
    images are drawn, in a bootstrap, unless each has one caption."""

    def _draw_averages(self, values: Tensor, evalset: EvalSet) -> Tensor:
        return stats.resampled_means(values, forms.image_of_caption(evalset))

    def compute_interval(self, scored: Scored) -> Interval:
        evalset, values = scored.evalset, self._sample_values(scored)
        if len(evalset.captions) == len(evalset):
            return super().compute_interval(scored)
        draws = self._draw_averages(values, evalset)
        images = stats.effective_units(forms.image_of_caption(evalset).bincount())
        mean = float(values.mean())
        return stats.design_interval(mean, draws, images, least=images, most=len(values))

    def compare_models(self, a: Scored, b: Scored) -> PairedDifference:
        each = HitShare if len(a.evalset.captions) == len(a.evalset) else SampleMetric
        return each.compare_models(self, a, b)


class SampleMean(SampleMetric):
    """Mean of values of any size over samples, with a bootstrap over them."""

    counts_hits = False

    def compute_interval(self, scored: Scored) -> Interval:
        values = self._sample_values(scored)
        draws = stats.resampled_means(values)
        if values.min() < 0 or values.max() > 1:  # not shares
            return stats.percentile_interval(draws)
        return stats.design_interval(float(values.mean()), draws, len(values), least=len(values))


class SeedMean(SampleMean):
    """Mean over samples and seeds: both vary, the samples as in a bootstrap, the seeds as their
    figures do (n is the effective sample size of both together)."""

    def compute_interval(self, scored: Scored) -> Interval:
        values = self._sample_values(scored)
        seeds = [hits.double().mean() for hits in _probe_hits(scored, self.name, "together")]
        return stats.design_interval(
            *(float(values.mean()), stats.resampled_means(values), len(values)),
            more_variance=float(torch.stack(seeds).var()) / len(seeds),
        )


class ClassMean(SampleMetric):
    """Share of hits in each class, then the mean over classes, with a bootstrap over samples."""

    def _average(self, values: Tensor, evalset: EvalSet) -> float:
        return stats.mean_per_class(values, forms.labels_of(evalset))

    def _draw_averages(self, values: Tensor, evalset: EvalSet) -> Tensor:
        return stats.resampled_class_means(values, forms.labels_of(evalset))

    def compute_interval(self, scored: Scored) -> Interval:
        draws = self._draw_averages(self._sample_values(scored), scored.evalset)
        samples = stats.effective_samples(forms.labels_of(scored.evalset).bincount())
        return stats.design_interval(self.compute_value(scored), draws, samples, most=samples)


@dataclass(frozen=True, kw_only=True)
class MeanPrecision(Metric):
    """Average precision of each class, then the mean over classes, with a bootstrap over images.

    It ranks images against each other, so no single image has a value of its own.
    """

    curve: Curve

    def compute_value(self, scored: Scored, ties: Ties = "together") -> float:
        positives = forms.positives_of(scored.evalset)
        return stats.mean_average_precision(_class_scores(scored), positives, self.curve, ties)

    def compute_interval(self, scored: Scored) -> Interval:
        positives = forms.positives_of(scored.evalset)
        images = int(positives.any(dim=1).sum())
        value, draws = self.compute_value(scored), self._bootstrap_draws(scored)
        return stats.design_interval(value, draws, images, most=max(images, int(positives.sum())))

    def compare_models(self, a: Scored, b: Scored) -> PairedDifference:
        # Equal seeds draw the same images for both.
        draws = self._bootstrap_draws(a) - self._bootstrap_draws(b)
        difference = self.compute_value(a) - self.compute_value(b)
        return _bootstrap_difference(difference, draws, len(a.evalset))

    def _bootstrap_draws(self, scored: Scored) -> Tensor:
        scores, positives = _class_scores(scored), forms.positives_of(scored.evalset)
        return stats.resampled_precisions(scores, positives, self.curve)


@dataclass(frozen=True, kw_only=True)
class CellFigure(Metric):
    """A figure of two numbers of every sample, of which few pairs differ, with a bootstrap."""

    cells: Callable[[Scored, Ties], Tensor]
    """What was answered, and what it is compared with or its group [Q, 2]."""
    figure: Callable[[Tensor, Tensor], Tensor]
    """Of cells [U, 2] and how many samples each draw takes of them [draws, U]."""

    def compute_value(self, scored: Scored, ties: Ties = "together") -> float:
        cells = self.cells(scored, ties)
        return float(self.figure(cells, torch.ones(1, len(cells), dtype=torch.float64)))

    def compute_interval(self, scored: Scored) -> Interval:
        cells = self.cells(scored, "together")
        draws = stats.resampled_cells(cells, self.figure)
        return stats.design_interval(self.compute_value(scored), draws, len(cells), most=len(cells))

    def compare_models(self, a: Scored, b: Scored) -> PairedDifference:
        both = torch.cat([self.cells(one, "together") for one in (a, b)], dim=1)
        draws = stats.resampled_cells(
            both, lambda one, drawn: self.figure(one[:, :2], drawn) - self.figure(one[:, 2:], drawn)
        )
        difference = self.compute_value(a) - self.compute_value(b)
        return _bootstrap_difference(difference, draws, len(both))


def _resolve_ranks(ranking: Ranking | None, ties: Ties) -> Tensor:
    """Ranks [Q] of the right answers under a rule for ties."""
    assert ranking is not None, "Scored.check_complete comes first"
    if ties == "together":
        return ranking.ranks
    return ranking.best_ranks if ties == "won" else ranking.worst_ranks


def _class_scores(scored: Scored) -> Tensor:
    assert scored.scores is not None, "Scored.check_complete comes first"
    return scored.scores


def _bootstrap_difference(
    difference: float, draws: Tensor, units: int, hits: Tensor | None = None
) -> PairedDifference:
    """A difference from bootstrap draws of it; `hits` [Q] are 1, 0 and -1 of what counts hits.

    Where every draw is the same, which says nothing of how sure it is, the interval is that of
    `units` samples of which the difference's share differs, and p the sign test's of all of them.
    """
    counts = (None, None) if hits is None else (int((hits > 0).sum()), int((hits < 0).sum()))
    interval, p = stats.percentile_interval(draws), stats.two_sided_p(draws)
    if interval[1] - interval[0] < _SAME:
        more = difference * units
        interval = stats.matched_interval(max(more, 0.0), max(-more, 0.0), units)
        p = 1.0 if abs(difference) < _SAME else min(1.0, 2.0 ** (1 - units))
    return PairedDifference(difference, interval, p, "paired bootstrap", *counts)


def _chance_of_precision(evalset: EvalSet) -> float:
    """Mean share of positives: of scores that know nothing, every threshold's precision is that."""
    shares = forms.positives_of(evalset).double().mean(dim=0)
    return float(shares[shares > 0].mean())


def define_top(k: int, **more: Any) -> Metric:
    """Share of images whose class is among the first k."""
    return HitShare(
        name=f"top{k}",
        title=f"top-{k}",
        kind="classification",
        per_sample=lambda scored, ties: _resolve_ranks(scored.classes, ties) < k,
        chance=lambda evalset: min(1.0, k / len(evalset.classnames)),
        **more,
    )


def define_recall(k: int) -> tuple[Metric, Metric]:
    """Share of images with a caption of theirs among the first k; of captions whose image is."""
    of_both: dict[str, Any] = {"kind": "retrieval", "printed_for": "retrieval"}
    return (
        HitShare(
            name=f"image_to_text_r{k}",
            title=f"image → text R@{k}",
            per_sample=lambda scored, ties: _resolve_ranks(scored.texts, ties) < k,
            chance=lambda evalset: stats.chance_of_hit(
                k, len(evalset.captions), [len(sample.captions) for sample in evalset.samples]
            ),
            column=f"{{key}}_text_r{k}",
            headline=2 if k == 1 else 0,
            **of_both,
        ),
        CaptionHitShare(
            name=f"text_to_image_r{k}",
            title=f"text → image R@{k}",
            per_sample=lambda scored, ties: _resolve_ranks(scored.images, ties) < k,
            chance=lambda evalset: min(1.0, k / len(evalset)),
            column=f"{{key}}_image_r{k}",
            headline=1 if k == 1 else 0,
            **of_both,
        ),
    )


def _probe_hits(scored: Scored, name: str, ties: Ties) -> list[Tensor]:
    """Return whether each image was answered right [N], once a seed."""
    return [_resolve_ranks(one, ties) < 1 for one in scored.probes[name].rankings]


def define_probe(name: str, title: str, form: type[SampleMetric] = HitShare) -> Metric:
    """Share of images that a probe answers right; a mean over seeds where it has several."""
    return form(
        name=name,
        title=title,
        kind="classification",
        per_sample=lambda scored, ties: (
            torch.stack(_probe_hits(scored, name, ties)).double().mean(0)
        ),
        chance=lambda evalset: 1 / len(evalset.classnames),
        has_it=lambda evalset: name in evalset.probes,
    )


def choose_rightly(question: Question, cosines: Tensor, ties: Ties, images: bool = False) -> bool:
    """Return whether every text of each image (of each text every image, with `images`) that
    belongs to it is nearer than any that does not; equally near is wrong, unless ties are won."""
    belongs = torch.zeros_like(cosines, dtype=torch.bool)
    belongs[tuple(zip(*question.pairs, strict=True))] = True
    if images:
        belongs, cosines = belongs.T, cosines.T
    right = cosines.masked_fill(~belongs, torch.inf).min(dim=1).values
    wrong = cosines.masked_fill(belongs, -torch.inf).max(dim=1).values
    return bool(((right >= wrong) if ties == "won" else (right > wrong)).all())


def jaccard_index(question: Question, cosines: Tensor, ties: Ties) -> float:
    """Jaccard index of a text's images and as many that are nearest to it."""
    right = {image for image, _ in question.pairs}
    first = {"together": 0, "won": -1, "lost": 1}[ties]
    order = sorted(
        range(len(question.images)),
        key=lambda one: (-float(cosines[one, 0]), first * (one in right)),
    )
    picked = set(order[: len(right)])
    return len(picked & right) / len(picked | right)


def chance_of_jaccard(question: Question) -> float:
    """Its expectation under random picks: the number of right ones is hypergeometric."""
    total, k = len(question.images), len(set(question.pairs))
    ways = [math.comb(k, j) * math.comb(total - k, k - j) * j / (2 * k - j) for j in range(k + 1)]
    return sum(ways) / math.comb(total, k)


def chance_of_texts(question: Question) -> float:
    return 1 / math.comb(len(question.texts), len(set(question.pairs)))


def _choice_values(
    scored: Scored, value: Callable[[Question, Tensor], float | bool], fewest: int = 0
) -> Tensor:
    """A value of every question [Q], of those with so many images."""
    assert scored.similarities is not None, "Scored.check_complete comes first"
    both = zip(scored.evalset.questions, scored.similarities, strict=True)
    return torch.tensor([float(value(*one)) for one in both if len(one[0].images) >= fewest])


def define_choice(
    name: str,
    title: str,
    form: Form,
    chance: Callable[[Question], float],
    directions: Sequence[bool],
    headline: int = 0,
) -> Metric:
    """Share of questions answered right, for images (False), for texts (True) or both."""
    return HitShare(
        name=name,
        title=title,
        kind="choice",
        per_sample=lambda scored, ties: _choice_values(
            scored, lambda q, cosines: all(choose_rightly(q, cosines, ties, x) for x in directions)
        ),
        has_it=lambda evalset: evalset.questions[0].form == form,
        chance=lambda evalset: fmean(map(chance, evalset.questions)),
        printed_for="choice",
        headline=headline,
    )


def define_jaccard(name: str, title: str, fewest: int, headline: int = 0) -> Metric:
    """Mean Jaccard index of questions with so many images (WinoGAViL's)."""
    return SampleMean(
        name=name,
        title=title,
        kind="choice",
        per_sample=lambda scored, ties: _choice_values(
            scored, lambda asked, cosines: jaccard_index(asked, cosines, ties), fewest
        ),
        has_it=lambda evalset: any(
            one.form == "images" and len(one.images) >= fewest for one in evalset.questions
        ),
        chance=lambda evalset: fmean(
            chance_of_jaccard(one) for one in evalset.questions if len(one.images) >= fewest
        ),
        printed_for="choice",
        headline=headline,
    )


def count_ties(scored: Scored) -> int:
    """Questions of a choice set that equal cosines decide."""
    metric = metrics_of(scored.evalset)[0]
    assert isinstance(metric, SampleMetric)
    won, lost = (metric.per_sample(scored, ties) for ties in ("won", "lost"))
    return int((won != lost).sum())


def _hits_any_label(scored: Scored, ties: Ties) -> Tensor:
    """Return whether the first class is one of an image's, of the images that have any [Q]; classes
    that tie for the first place are in the order of their numbers."""
    positives, scores = forms.positives_of(scored.evalset), _class_scores(scored)
    labelled = positives.any(dim=1)
    positives, scores = positives[labelled], scores[labelled]
    best = scores == scores.max(dim=1, keepdim=True).values
    if ties == "together":
        return positives.gather(1, best.int().argmax(dim=1, keepdim=True))[:, 0]
    return (best & positives).any(dim=1) if ties == "won" else ~(best & ~positives).any(dim=1)


def _answers_and_labels(scored: Scored, ties: Ties) -> Tensor:
    """The class given and that of each image [Q, 2]."""
    assert scored.classes is not None, "Scored.check_complete comes first"
    labels, top = forms.labels_of(scored.evalset), scored.classes.top
    other = torch.where(top[:, 0] == labels, top[:, -1], top[:, 0])
    right = _resolve_ranks(scored.classes, ties) < 1
    return torch.stack([torch.where(right, labels, other), labels], dim=1)


def define_worst_group(k: int) -> Metric:
    """Top-k of the group of images in which it is smallest."""
    return CellFigure(
        name=f"worst_group_top{k}",
        title=f"top-{k} of the worst group",
        kind="classification",
        cells=lambda scored, ties: torch.stack(
            [_resolve_ranks(scored.classes, ties) < k, forms.groups_of(scored.evalset)], dim=1
        ),
        figure=stats.worst_group_share,
        has_it=lambda evalset: all(one.group >= 0 for one in evalset.samples),
    )


METRICS: tuple[Metric, ...] = (
    define_top(1, printed_for="top1", column="{column}", headline=1),
    define_top(5),
    SampleMean(
        name="kinetics_mean",
        title="mean of top-1 and top-5",
        kind="classification",
        per_sample=lambda scored, ties: (
            torch.stack([_resolve_ranks(scored.classes, ties) < k for k in (1, 5)]).double().mean(0)
        ),
        chance=lambda evalset: sum(min(1.0, k / len(evalset.classnames)) for k in (1, 5)) / 2,
        printed_for="kinetics_mean",
        column="{column}",
        headline=1,
        is_theirs_alone=True,
    ),
    ClassMean(
        name="mean_per_class",
        title="mean per class",
        kind="classification",
        per_sample=lambda scored, ties: _resolve_ranks(scored.classes, ties) < 1,
        chance=lambda evalset: 1 / len(evalset.classnames),
    ),
    define_worst_group(1),
    define_worst_group(5),
    CellFigure(
        name="f1_macro",
        title="F1, mean over classes",
        kind="classification",
        cells=_answers_and_labels,
        figure=stats.f1_macro,
        has_it=lambda evalset: evalset.known is not None and evalset.known.datacomp == "f1_macro",
    ),
    define_probe("linear_probe", "linear probe"),
    define_probe("knn", "kNN"),
    *(define_probe(f"few_shot_{k}", f"{k}-shot", SeedMean) for k in (1, 2, 4, 8, 16, 32)),
    MeanPrecision(
        name="map",
        title="mAP",
        kind="multilabel",
        curve=stats.area_under_curve,
        chance=_chance_of_precision,
        printed_for="map",
        headline=1,
    ),
    MeanPrecision(
        name="map_11pt",
        title="mAP, 11 points",
        kind="multilabel",
        curve=stats.eleven_points,
        chance=_chance_of_precision,
    ),
    HitShare(
        name="real_top1",
        title="top-1, any of the labels",
        kind="multilabel",
        per_sample=_hits_any_label,
        printed_for="real_top1",
        headline=1,
        is_theirs_alone=True,
    ),
    *chain(*zip(*map(define_recall, (1, 5, 10)), strict=True)),
    define_choice("accuracy", "accuracy", "texts", chance_of_texts, [False], headline=1),
    define_choice("group_score", "group score", "two by two", lambda _: 1 / 6, [False, True], 1),
    define_choice("text_score", "text score", "two by two", lambda _: 1 / 4, [False]),
    define_choice("image_score", "image score", "two by two", lambda _: 1 / 4, [True]),
    define_jaccard("jaccard", "Jaccard index", 2, headline=1),
    define_jaccard("jaccard_10", "Jaccard index, 10 images or more", 10),
)
"""Every metric, in the order in which figures are shown."""


def metrics_of(evalset: EvalSet) -> list[Metric]:
    return [one for one in (*METRICS, *evalset.own_metrics) if one.applies_to(evalset)]


def metrics_in(figures: Mapping[str, Any]) -> list[Metric]:
    return [metric for metric in METRICS if metric.name in figures]


def headlines_of(kind: Kind, named: PaperMetric | None) -> list[Metric]:
    """The figures of a set that are shown first.

    `named` is its metric in the registry; None of a set that is not there, which is taken for one
    of those that all sets of its kind are like.
    """
    first = [one for one in METRICS if one.kind == kind and one.headline]
    named = named or next(one.printed_for for one in first if not one.is_theirs_alone)
    return sorted((one for one in first if one.printed_for == named), key=lambda one: one.headline)


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
    return next((one.title for one in METRICS if one.name == name), name.replace("_", " "))


def judged_metrics() -> tuple[str, ...]:
    """Names of the figures that are shown first of some set, which the gate judges."""
    return tuple(one.name for one in METRICS if one.headline)
