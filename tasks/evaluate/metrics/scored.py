"""The answers of one model to one evaluation set: rankings, or scores of several classes."""

from collections.abc import Mapping, Sized
from dataclasses import dataclass, field

import torch
from torch import Tensor

from evaclip_model.zeroshot import exact_ranks
from tasks.evaluate.metrics.probes import ProbeAnswers
from tasks.evaluate.sets.published_layout import EvalSet
from tasks.evaluate.sets.set_registry import Kind

SHOWN = 8
"""First answers kept of every query, for the report."""


@dataclass(frozen=True)
class Scored:
    """One model's answers to one set; the fields that the kind of the set calls for are filled."""

    evalset: EvalSet
    classes: exact_ranks.Ranking | None = None
    """Of a classification set, one query an image."""
    texts: exact_ranks.Ranking | None = None
    """Image-to-text retrieval, one query an image."""
    images: exact_ranks.Ranking | None = None
    """Text-to-image retrieval, one query a caption."""
    scores: Tensor | None = None
    """Of a multilabel set: fp32 logits [N, C]."""
    similarities: tuple[Tensor, ...] | None = None
    """Of a choice set: fp32 cosines of the images and texts of each question [I, T]."""
    probes: Mapping[str, ProbeAnswers] = field(default_factory=dict)
    """Figure -> the answers of a probe to a classification set."""
    cut: int = 0
    """Captions, or prompts, whose end the model does not see: its context is shorter."""

    def rankings_by_direction(self) -> dict[str, exact_ranks.Ranking]:
        """The rankings there are, by the direction of the question."""
        named = {
            "image → class": self.classes,
            "image → text": self.texts,
            "text → image": self.images,
        }
        return {name: ranking for name, ranking in named.items() if ranking is not None}

    def check_complete(self) -> None:
        """Raise RuntimeError unless every sample of the set's index was answered exactly once."""
        images, captions = len(self.evalset), len(self.evalset.captions)
        counts: dict[Kind, list[tuple[Sized | None, int]]] = {
            "classification": [(self.classes, images)],
            "multilabel": [(self.scores, images)],
            "retrieval": [(self.texts, images), (self.images, captions)],
            "choice": [(self.similarities, len(self.evalset.questions))],
        }
        for answers, expected in counts[self.evalset.kind]:
            if answers is None:
                raise RuntimeError(f"set '{self.evalset.name}' was not ranked")
            if len(answers) != expected:
                raise RuntimeError(
                    f"set '{self.evalset.name}': {len(answers)} queries ranked, its index holds "
                    f"{expected}"
                )


def labels_of(evalset: EvalSet) -> Tensor:
    """Class of every image [N]."""
    return torch.tensor([sample.label for sample in evalset.samples])


def groups_of(evalset: EvalSet) -> Tensor:
    """Group of every image [N], numbered from 0."""
    groups = torch.tensor([sample.group for sample in evalset.samples])
    numbered: Tensor = torch.unique(groups, return_inverse=True)[1]
    return numbered


def positives_of(evalset: EvalSet) -> Tensor:
    """Classes that every image of a multilabel set shows [N, C], bool."""
    shown = torch.zeros(len(evalset), len(evalset.classnames), dtype=torch.bool)
    for row, sample in enumerate(evalset.samples):
        shown[row, list(sample.labels)] = True
    return shown


def image_of_caption(evalset: EvalSet) -> Tensor:
    """Image of every caption [T]."""
    counts = torch.tensor([len(sample.captions) for sample in evalset.samples])
    return torch.repeat_interleave(torch.arange(len(evalset)), counts)


def score_set(evalset: EvalSet, images: Tensor, texts: Tensor) -> Scored:
    """Rank images [N, D] against a text classifier [C, D], or captions [T, D] both ways; or
    compare those of each question."""
    if evalset.kind == "classification":
        return Scored(
            evalset, classes=exact_ranks.rank_classes(images, texts, labels_of(evalset), SHOWN)
        )
    if evalset.kind == "multilabel":
        return Scored(evalset, scores=exact_ranks.class_scores(images, texts))
    if evalset.kind == "choice":
        row = {sample.key: number for number, sample in enumerate(evalset.samples)}
        portions = torch.split(texts, [len(one.texts) for one in evalset.questions])
        return Scored(
            evalset,
            similarities=tuple(
                exact_ranks.class_scores(images[[row[key] for key in one.images]], mine)
                for one, mine in zip(evalset.questions, portions, strict=True)
            ),
        )
    owner = image_of_caption(evalset)
    return Scored(
        evalset,
        texts=exact_ranks.retrieve_texts(images, texts, owner, SHOWN),
        images=exact_ranks.retrieve_images(images, texts, owner, SHOWN),
    )
