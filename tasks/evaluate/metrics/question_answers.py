"""Answers to one question of a choice set, from the cosines of its images and texts [I, T]."""

import math

import torch
from torch import Tensor

from evaclip_model.zeroshot.statistics import Ties
from tasks.evaluate.sets.choice_questions import Question


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
