"""Sets without images, and answers to them made up: what figures are made of.

Covers: a set of any kind from its labels alone, a ranking from the answers given.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from evaclip_model.zeroshot.exact_ranks import Ranking, rank_targets
from evaclip_model.zeroshot.set_layout import Span
from tasks.evaluate.sets.published_layout import EvalSample, EvalSet
from tasks.evaluate.sets.set_registry import KnownSet

NOWHERE = Span(Path("nowhere.tar"), 0, 0)


def class_set(
    labels: Sequence[int], names: Sequence[str], known: KnownSet | None = None
) -> EvalSet:
    samples = tuple(EvalSample(f"s{n:07d}", NOWHERE, label) for n, label in enumerate(labels))
    name = known.key if known else "classes"
    templates = ("{c}",) * (known.templates or 1 if known else 1)
    return EvalSet(name, "classification", samples, tuple(names), templates, "f", known=known)


def label_set(shown: Sequence[Sequence[int]], names: Sequence[str]) -> EvalSet:
    samples = tuple(
        EvalSample(f"s{n:07d}", NOWHERE, labels=tuple(labels)) for n, labels in enumerate(shown)
    )
    return EvalSet("labels", "multilabel", samples, tuple(names), ("{c}",), "f")


def caption_set(counts: Sequence[int], known: KnownSet | None = None) -> EvalSet:
    samples = tuple(
        EvalSample(f"s{n:07d}", NOWHERE, captions=tuple(f"image {n}, {i}" for i in range(count)))
        for n, count in enumerate(counts)
    )
    return EvalSet(
        known.key if known else "captions", "retrieval", samples, (), (), "f", known=known
    )


def answered(evalset: EvalSet, said: Sequence[int], second: Sequence[int] | None = None) -> Ranking:
    """Classes given first, and second, to every image; all others tie behind them."""
    logits = torch.zeros(len(evalset), len(evalset.classnames))
    rows = torch.arange(len(evalset))
    if second is not None:
        logits[rows, torch.tensor(second)] = 1
    logits[rows, torch.tensor(said)] = 2
    return rank_targets(logits, torch.tensor([sample.label for sample in evalset.samples]), 8)
