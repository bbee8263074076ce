"""Test images that a model has seen in training, and its figures without them.

Looks are compared with 64 bits, so that pictures of little content (blank ones, digits, plain
text) may be taken for each other: figures without such images are a bound, not a correction.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch

from evaclip_model.files import replace_file
from tasks.evaluate.metrics.compute import Figures, compute_figures
from tasks.evaluate.metrics.scored import Scored, image_of_caption
from tasks.evaluate.sets.published_layout import EvalSet
from tasks.index.perceptual_hash import ImageHashes, KnownHashes, hash_images
from tasks.progress import Report

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
    threads = len(os.sched_getaffinity(0))
    hashes = hash_images((sample.image.read() for sample in evalset.samples), threads)
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
