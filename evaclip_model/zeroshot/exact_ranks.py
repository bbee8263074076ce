"""Zero-shot classification and retrieval: text classifiers, exact ranks.

Tie rule, the same everywhere: the rank of an answer is the number of answers with a strictly
larger logit plus the number of equal ones with a lower index. Features may come in any precision;
they are normalised and multiplied in fp32, where ties between different answers all but vanish.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from evaclip_model.errors import InputError
from evaclip_model.zeroshot.imagenet_prompts import PLACEHOLDER

ROWS = 256
"""Most queries ranked at once."""
LOGITS = 1 << 23
"""Most logits held at once, as long as one query has fewer; bounds memory for large galleries."""


@dataclass(frozen=True)
class Ranking:
    """Ranks of the right answer of every query; all tensors have one entry per query [Q]."""

    ranks: Tensor
    """Rank of the right answer under the tie rule, 0 = first."""
    best_ranks: Tensor
    """Its rank if all ties went its way."""
    worst_ranks: Tensor
    """Its rank if all ties went against it."""
    tied: Tensor
    """True where several answers share the largest logit."""
    top: Tensor
    """Indices of the first answers under the tie rule [Q, k]."""

    def __len__(self) -> int:
        return int(self.ranks.numel())

    def select_queries(self, queries: Tensor) -> Self:
        """The same of some queries only: their mask, or their numbers."""
        return type(self)(*(getattr(self, one.name)[queries] for one in fields(self)))


def fill_templates(classnames: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Templates filled in, class by class; a name that occurs again is asked once. Raises
    InputError: no class, no template, or a template without `{c}`."""
    if not classnames or not templates:
        raise InputError("a text classifier needs at least one class name and one template")
    for template in templates:
        if PLACEHOLDER not in template:
            raise InputError(f"template '{template}' has no {PLACEHOLDER} for the class name")
    names = dict.fromkeys(classnames)
    return [template.replace(PLACEHOLDER, name) for name in names for template in templates]


def build_classifier(features: Tensor, classnames: Sequence[str]) -> Tensor:
    """One unit vector a class [C, D]: the renormalised mean of its prompts, whose `features`
    [U * T, D] are those of the T prompts of each of the U distinct names, name by name."""
    row = {name: number for number, name in enumerate(dict.fromkeys(classnames))}
    means = features.reshape(len(row), -1, features.shape[-1]).mean(dim=1)
    return normalise_features(means, "text")[torch.tensor([row[name] for name in classnames])]


def normalise_features(features: Tensor, what: str) -> Tensor:
    """Features [..., D] as fp32 unit vectors. Raises InputError: a value is not finite; such
    features would rank every answer first."""
    features = features.float()
    if not bool(torch.isfinite(features).all()):
        raise InputError(
            f"the model gives {what} features that are not finite: its weights have diverged, "
            "train again with a lower learning rate or from an earlier checkpoint"
        )
    return torch.nn.functional.normalize(features, dim=-1)


@dataclass(frozen=True)
class Gallery:
    """Answers to choose from, each distinct one multiplied once, so that equal ones get bitwise
    equal logits: kernels of a matrix product treat columns at the edge of a block in another order
    of summation."""

    distinct: Tensor
    """Fp32 unit vectors [U, D]."""
    place: Tensor
    """Row of `distinct` of every answer [G]."""

    @classmethod
    def from_features(cls, features: Tensor) -> Self:
        distinct, place = torch.unique(features.float(), dim=0, return_inverse=True)
        return cls(distinct, place)

    def compute_logits(self, queries: Tensor) -> Tensor:
        """Cosine logits in fp32 [Q, G] of unit vectors [Q, D] of any precision."""
        with _whole_fp32(queries.device.type):
            return (queries.float() @ self.distinct.T)[:, self.place]

    def split_queries(self, queries: int) -> Sequence[Tensor]:
        """Numbers of so many queries, in portions whose logits fit into memory."""
        rows = max(1, min(ROWS, LOGITS // len(self.place)))
        return torch.split(torch.arange(queries), rows)


def top_k(logits: Tensor, k: int) -> Tensor:
    """Indices of the k largest logits of every row [Q, k], equal ones by lower index first."""
    k = min(k, logits.shape[1])
    values, first = logits.topk(k, dim=1)
    # Of equal logits `topk` takes any, in any order; sorting all answers of such rows only is an
    # order of magnitude less work, because there are few of them.
    tied = (values[:, 1:] == values[:, :-1]).any(dim=1)
    tied |= (logits >= values[:, -1:]).sum(dim=1) > k
    first[tied] = logits[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return first


def rank_targets(logits: Tensor, targets: Tensor, k: int = 5) -> Ranking:
    """Rank answer `targets[q]` [Q] of every query among all its answers [Q, G]."""
    value = logits.gather(1, targets[:, None])
    larger = (logits > value).sum(dim=1)
    equal = logits == value
    before = torch.arange(logits.shape[1], device=logits.device) < targets[:, None]
    largest = logits.max(dim=1, keepdim=True).values
    return Ranking(
        ranks=larger + (equal & before).sum(dim=1),
        best_ranks=larger,
        worst_ranks=larger + equal.sum(dim=1) - 1,
        tied=(logits == largest).sum(dim=1) > 1,
        top=top_k(logits, k),
    )


def rank_classes(images: Tensor, classifier: Tensor, labels: Tensor, k: int = 5) -> Ranking:
    """Rank the true class `labels` [N] of images [N, D] among the classes [C, D]."""
    gallery = Gallery.from_features(classifier)
    return join_rankings(
        rank_targets(gallery.compute_logits(images[rows]), labels[rows], k)
        for rows in gallery.split_queries(len(images))
    )


def class_scores(images: Tensor, classifier: Tensor) -> Tensor:
    """Logit of every class [C, D] for every image [N, D], in fp32 [N, C]."""
    gallery = Gallery.from_features(classifier)
    return torch.cat(
        [gallery.compute_logits(images[rows]) for rows in gallery.split_queries(len(images))]
    )


def retrieve_texts(images: Tensor, texts: Tensor, image_of_text: Tensor, k: int = 10) -> Ranking:
    """Image-to-text: the best-ranked caption of every image [N, D] among all captions [T, D];
    `image_of_text` [T] is the image each belongs to, every image has one or more."""
    gallery = Gallery.from_features(texts)
    return join_rankings(
        _rank_best(gallery.compute_logits(images[rows]), image_of_text[None, :] == rows[:, None], k)
        for rows in gallery.split_queries(len(images))
    )


def retrieve_images(images: Tensor, texts: Tensor, image_of_text: Tensor, k: int = 10) -> Ranking:
    """Text-to-image: the image [N, D] of every caption [T, D] among all images."""
    return rank_classes(texts, images, image_of_text, k)


@contextmanager
def _whole_fp32(device: str) -> Iterator[None]:
    """Matrix products in fp32 proper, whatever the program around allows itself."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(allowed)


def _rank_best(logits: Tensor, right: Tensor, k: int) -> Ranking:
    """Rank the first of several right answers (mask [Q, G]) of every query."""
    best = logits.masked_fill(~right, -torch.inf).max(dim=1, keepdim=True).values
    candidates = right & (logits == best)
    first = top_k(candidates.int(), 1)[:, 0]
    ranking = rank_targets(logits, first, k)
    # Ties among an image's own captions cost nothing, whichever of them comes first.
    others = (logits == best).sum(dim=1) - candidates.sum(dim=1)
    return replace(ranking, worst_ranks=ranking.best_ranks + others)


def join_rankings(parts: Iterable[Ranking]) -> Ranking:
    rankings = list(parts)
    return Ranking(
        *(torch.cat([getattr(part, one.name) for part in rankings]) for one in fields(Ranking))
    )
