"""Figures of one model on one set, and of two models on the same set."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from evaclip_model.errors import InputError
from evaclip_model.zeroshot.statistics import average_precisions
from tasks.evaluate.metrics.metric import PairedDifference, count_ties, metrics_of
from tasks.evaluate.metrics.scored import Scored, labels_of, positives_of
from tasks.evaluate.sets.published_layout import EvalSet

CONFUSIONS = 20
"""Commonest mistakes that are written down."""
Figures = dict[str, Any]


def compute_figures(scored: Scored) -> Figures:
    """Metrics by name, with `n`, `intervals` (95 %), `bounds` under ties, and `tied` queries.

    Sets with classes also have `per_class`; those of one class an image have the commonest
    `confusions`: the true class, the one given, how often. RuntimeError if not every sample of the
    index was ranked exactly once.
    """
    scored.check_complete()
    metrics = metrics_of(scored.evalset)
    values = {metric.name: metric.compute_value(scored) for metric in metrics}
    probes = {name: one.made for name, one in scored.probes.items()}
    return {
        **_count_answers(scored),
        "intervals": {one.name: one.compute_interval(scored) for one in metrics},
        "bounds": {one.name: one.tie_bounds(scored, values[one.name]) for one in metrics},
        **values,
        **({"probes": probes} if probes else {}),
        **_describe_classes(scored),
    }


def chance_levels(evalset: EvalSet) -> dict[str, float]:
    """Share that random answers reach, by metric, for those with a known one."""
    return {one.name: one.chance(evalset) for one in metrics_of(evalset) if one.chance is not None}


def compare_models(a: Scored, b: Scored) -> dict[str, PairedDifference]:
    """Every figure of model a less that of model b on the same samples, by metric; InputError if
    they were not evaluated on the same images and classes."""
    if a.evalset.fingerprint != b.evalset.fingerprint:
        raise InputError(
            f"evaluation set '{a.evalset.name}': the two models were not evaluated on the same "
            "images and classes, so their answers cannot be paired: evaluate both again"
        )
    a.check_complete()
    b.check_complete()
    return {metric.name: metric.compare_models(a, b) for metric in metrics_of(a.evalset)}


def _count_answers(scored: Scored) -> Figures:
    evalset = scored.evalset
    found: Figures = {"n": len(evalset)}
    if evalset.kind == "choice":
        return found | {"questions": len(evalset.questions), "tied": count_ties(scored)}
    if scored.scores is not None:
        positives = positives_of(evalset)
        tied, right = _count_tied_images(scored.scores, positives), int(positives.sum())
        return found | {"classes": len(evalset.classnames), "positives": right, "tied": tied}
    tied = sum(int(ranking.tied.sum()) for ranking in scored.rankings_by_direction().values())
    if scored.images is not None:
        return found | {"captions": len(scored.images), "tied": tied}
    return found | {"classes": len(evalset.classnames), "tied": tied}


def _describe_classes(scored: Scored) -> Figures:
    evalset = scored.evalset
    if scored.scores is not None:
        positives = positives_of(evalset)
        precisions = average_precisions(scored.scores, positives).tolist()
        each = zip(evalset.classnames, positives.sum(dim=0).tolist(), precisions, strict=True)
        rows = [{"name": x, "n": n, "average_precision": p if n else None} for x, n, p in each]
        return {"per_class": rows}
    if scored.classes is None:
        return {}
    labels, classes = labels_of(evalset), len(evalset.classnames)
    counts = torch.bincount(labels, minlength=classes).tolist()
    wrong, given = scored.classes.ranks > 0, scored.classes.top[:, 0]
    right = torch.bincount(labels[~wrong], minlength=classes).tolist()
    pairs = Counter(zip(labels[wrong].tolist(), given[wrong].tolist(), strict=True))
    return {
        "per_class": [
            {"name": name, "n": n, "correct": hits, "share": hits / n if n else None}
            for name, n, hits in zip(evalset.classnames, counts, right, strict=True)
        ],
        "confusions": [
            [evalset.classnames[true], evalset.classnames[said], times]
            for (true, said), times in pairs.most_common(CONFUSIONS)
        ],
    }


def _count_tied_images(scores: Tensor, positives: Tensor) -> int:
    """Images that share a class's score [N, C] with one of the other truth."""
    tied = torch.zeros(len(scores), dtype=torch.bool)
    for column, positive in zip(scores.T, positives.T, strict=True):
        _, place = torch.unique(column, return_inverse=True)
        right = torch.bincount(place, weights=positive.double())[place]
        tied |= (right > 0) & (right < torch.bincount(place)[place])
    return int(tied.sum())
