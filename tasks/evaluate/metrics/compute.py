"""Figures of one model on one set, without test images it has seen in training, and of two models;
metrics of a user's own.

Looks are compared with 64 bits, so that pictures of little content (blank ones, digits, plain
text) may be taken for each other: figures without such images are a bound, not a correction.
"""

import runpy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from torch import Tensor

from evaclip_model.errors import InputError, shorten_error
from evaclip_model.files import replace_file
from evaclip_model.zeroshot.statistics import Ties, average_precisions
from tasks.evaluate.metrics.metric import (
    METRICS,
    PairedDifference,
    SampleMetric,
    count_ties,
    metrics_of,
)
from tasks.evaluate.metrics.scored import Scored, image_of_caption, labels_of, positives_of
from tasks.evaluate.sets.published_layout import EvalSet
from tasks.index.perceptual_hash import ImageHashes, KnownHashes, hash_images
from tasks.progress import Report

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


Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TrainingData:
    """One version of a dataset that a model was trained on."""

    verified: Path
    """Folder of the verification, which holds the index."""
    left_out: Path
    """Parquet of (row of the index, reason): the samples that the version does not use."""


def hash_set(evalset: EvalSet, blocks: Path) -> ImageHashes:
    """Hashes of a set's images in the order of its samples, cached in `blocks`."""
    file = blocks / f"{evalset.name}-{evalset.fingerprint}.npz"
    if file.is_file():
        with np.load(file) as kept:
            return ImageHashes(tuple(kept["sha256"].tolist()), kept["looks"], kept["decoded"])
    hashes = hash_images(sample.image.read() for sample in evalset.samples)
    blocks.mkdir(parents=True, exist_ok=True)
    with replace_file(file) as beside, beside.open("wb") as stream:
        np.savez(stream, sha256=hashes.sha256, looks=hashes.looks, decoded=hashes.decoded)
    return hashes


def seen_in_training(
    sets: Mapping[str, ImageHashes], trained_on: Sequence[TrainingData], most: int, report: Report
) -> dict[str, Mask]:
    """Masks of the images of each set with a copy, or a look-alike, among the training samples; all
    are looked for in one pass over each index.

    Samples that the versions of `trained_on` leave out do not count; two look-alikes may differ in
    `most` of the 64 bits of a perceptual hash.
    """
    # DuckDB and pyarrow's kernels come only here: most evaluations ask nothing of a training.
    from tasks.index.sample_index import Kind, SampleIndex

    digests = sorted({digest for hashes in sets.values() for digest in hashes.sha256})
    looks = [hashes.looks[hashes.decoded] for hashes in sets.values()]
    tested = KnownHashes(np.concatenate([np.empty(0, np.uint64), *looks]), most)
    indexes = [SampleIndex(one.verified) for one in trained_on]
    total, done = sum(index.rows for index in indexes), 0
    copies: set[str] = set()
    alike = [np.empty(0, np.uint64)]
    for index, data in zip(indexes, trained_on, strict=True):
        used = np.ones(index.rows, np.bool_)
        used[pq.read_table(data.left_out, columns=["row"])["row"].to_numpy()] = False
        for row in index.find_samples(Kind.HASH, digests):
            if used[row["row"]]:
                copies.update(row[name] for name in ("sha256", "stored_sha256") if row[name])
        start = 0
        for table in index.iterate_chunks("phash"):
            here = used[start : start + table.num_rows] & table["phash"].is_valid().to_numpy()
            hashes = table["phash"].fill_null(0).to_numpy()[here]
            alike.append(np.unique(hashes[tested.find_near(hashes)]))
            start += table.num_rows
            done += table.num_rows
            report(done, total, "test images among training samples")
    known = KnownHashes(np.concatenate(alike), most)
    return {
        name: np.array([digest in copies for digest in hashes.sha256], np.bool_)
        | (known.find_near(hashes.looks) & hashes.decoded)
        for name, hashes in sets.items()
    }


def figures_without(scored: Scored, seen: Mask) -> Figures | None:
    """Figures of the images that were not seen; none where all were, where those of a multilabel
    set that are left have no class, or of a choice set, whose questions share images.

    Of retrieval, the questions of the images left and of their captions; the answers to choose
    from stay all there are, so that a question is as hard as it was.
    """
    left = torch.from_numpy(~seen)
    evalset = scored.evalset
    if not bool(left.any()) or evalset.kind == "choice":
        return None
    samples = tuple(one for one, gone in zip(evalset.samples, seen, strict=True) if not gone)
    if evalset.kind == "multilabel" and not any(one.labels for one in samples):
        return None
    return compute_figures(
        Scored(
            replace(evalset, samples=samples),
            classes=scored.classes and scored.classes.select_queries(left),
            texts=scored.texts and scored.texts.select_queries(left),
            images=scored.images and scored.images.select_queries(left[image_of_caption(evalset)]),
            scores=None if scored.scores is None else scored.scores[left],
            probes={
                name: replace(
                    one, rankings=tuple(each.select_queries(left) for each in one.rankings)
                )
                for name, one in scored.probes.items()
            },
        )
    )


def load_metrics(files: Sequence[str]) -> tuple[SampleMetric, ...]:
    """The metrics of a user's own that Python files define, each in a list `METRICS` of `HitShare`,
    `SampleMean`, `ClassMean` or another `SampleMetric`; InputError, in one sentence, where a file
    raises, defines no metrics, or one with a name that is taken."""
    found: list[SampleMetric] = []
    for path in map(Path, files):
        try:
            defined = runpy.run_path(str(path)).get("METRICS")
        except Exception as error:  # whatever the user's code raises
            raise InputError(f"{path} cannot be run: {_name_error(error)}") from error
        if not isinstance(defined, Sequence) or not defined:
            raise InputError(f"{path} defines no METRICS: a list of metrics is expected")
        for metric in defined:
            if not isinstance(metric, SampleMetric):
                raise InputError(
                    f"{path}: METRICS holds {metric!r:.60}, not a metric with a value for each "
                    "sample (HitShare, SampleMean or ClassMean of tasks.evaluate.metrics.metric)"
                )
            if metric.name in {one.name for one in (*METRICS, *found)}:
                raise InputError(f"{path}: there is a metric '{metric.name}': give another name")
            found.append(_guard_metric(metric, path))
    return tuple(found)


def _guard_metric(metric: SampleMetric, path: Path) -> SampleMetric:
    """The metric, whose values are looked at before anything is made of them."""
    given = metric.per_sample

    def compute_values(scored: Scored, ties: Ties) -> Tensor:
        evalset = scored.evalset
        where = f"{path}: metric '{metric.name}' on set '{evalset.name}'"
        try:
            values: Any = given(scored, ties)
        except Exception as error:  # whatever the user's code raises
            raise InputError(f"{where} raises {_name_error(error)}") from error
        asked = len(evalset.questions or evalset.captions) or len(evalset)
        sizes = dict.fromkeys([len(evalset), asked])
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        if shape not in [(size,) for size in sizes]:
            wanted = " or ".join(f"[{size}]" for size in sizes)
            raise InputError(f"{where} returns {shape}, not a tensor {wanted}: a value a question")
        if not torch.isfinite(values.double()).all():
            raise InputError(f"{where} returns values that are not finite")
        return torch.as_tensor(values)

    return replace(metric, per_sample=compute_values)


def _name_error(error: Exception) -> str:
    return f"{type(error).__name__}: {shorten_error(error)}"
