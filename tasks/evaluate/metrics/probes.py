"""Probes: classifiers made of the features of a set's train part, answering its test images.

linear_probe   logistic regression on the whole train part (`solve_regression`)
knn            vote of the nearest training images by cosine
few_shot_K     logistic regression on K images a class, drawn once a seed

Features are unit vectors, as for all figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from evaclip_model.errors import InputError
from evaclip_model.zeroshot.exact_ranks import Gallery, Ranking, join_rankings, rank_targets, top_k
from tasks.evaluate.config import ProbeConfig

TEMPERATURE = 0.07
"""A weighted vote counts exp(cosine / this), as of Wu et al. 2018 and DINO."""
STRENGTHS = tuple(10 ** (-step / 2) for step in range(2, 15))
"""Values of l2 that are tried, strongest first: 0.1 to 1e-7."""
HELD_OUT = 5
"""Every fifth training image of a class chooses among them."""
SHOWN = 8
_KEPT = 1 << 24
"""Most scores held at once."""


@dataclass(frozen=True)
class LabelledFeatures:
    values: Tensor
    """Unit features [N, D]."""
    labels: Tensor
    """[N]"""
    device: str = "cpu"
    """Where regressions on it are solved."""

    def select_rows(self, rows: Tensor) -> LabelledFeatures:
        """Return those of some images: their mask, or their numbers."""
        return replace(self, values=self.values[rows], labels=self.labels[rows])


@dataclass(frozen=True)
class ProbeAnswers:
    """The rankings of the classes that one probe gives, one or one a seed, and how it was made."""

    rankings: tuple[Ranking, ...]
    made: dict[str, Any] = field(default_factory=dict)


def answer_probes(
    train: LabelledFeatures,
    test: LabelledFeatures,
    classes: int,
    figures: Sequence[str],
    config: ProbeConfig,
) -> dict[str, ProbeAnswers]:
    """The answers of every probe, by the name of its figure; InputError where the train part has
    fewer than two classes."""
    if int((train.labels.bincount() > 0).sum()) < 2:
        raise InputError("a probe needs training images of two classes or more")
    ask = {"linear_probe": _ask_linear, "knn": _ask_neighbours}
    return {
        name: ask[name](train, test, classes, config)
        if name in ask
        else _ask_few(train, test, classes, config, int(name.rpartition("_")[2]))
        for name in figures
    }


def choose_strength(train: LabelledFeatures, classes: int) -> float:
    """The l2 of `STRENGTHS` that is right most often on the training images held out, the
    strongest of equal ones."""
    held = _places_in_class(train.labels) % HELD_OUT == HELD_OUT - 1
    fit, rest = train.select_rows(~held), train.select_rows(held)
    if not len(rest.labels):
        raise InputError(
            f"no class has {HELD_OUT} training images, so none can be held out to choose l2: "
            "give evaluate.probe.l2"
        )
    right, solved = {}, None
    for l2 in STRENGTHS:
        solved = _fit(fit, classes, l2, solved)
        right[l2] = int((solved.compute_scores(rest.values).argmax(dim=1) == rest.labels).sum())
    return max(right, key=right.__getitem__)


def neighbour_votes(
    train: LabelledFeatures, queries: Tensor, classes: int, config: ProbeConfig
) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows, votes [rows, C]) of queries [N, D], some at a time; equally near images are taken in
    their order."""
    gallery = Gallery.from_features(train.values)
    for rows in gallery.split_queries(len(queries)):
        nearness = gallery.compute_logits(queries[rows])
        near = top_k(nearness, min(config.neighbours, len(train.labels)))
        weights = (nearness.gather(1, near).double() / TEMPERATURE).exp()
        if not config.weighted:
            weights = torch.ones_like(weights)
        votes = torch.zeros(len(rows), classes, dtype=torch.float64)
        yield rows, votes.scatter_add(1, train.labels[near], weights)


def _ask_neighbours(
    train: LabelledFeatures, test: LabelledFeatures, classes: int, config: ProbeConfig
) -> ProbeAnswers:
    ranked = join_rankings(
        rank_targets(votes, test.labels[rows], SHOWN)
        for rows, votes in neighbour_votes(train, test.values, classes, config)
    )
    voters = {"neighbours": config.neighbours, "weighted": config.weighted}
    return ProbeAnswers((ranked,), {"train_images": len(train.labels), **voters})


def _ask_linear(
    train: LabelledFeatures, test: LabelledFeatures, classes: int, config: ProbeConfig
) -> ProbeAnswers:
    l2 = config.l2 or choose_strength(train, classes)
    solved = _fit(train, classes, l2)
    made = {"train_images": len(train.labels), "l2": l2, "l2_was_chosen": config.l2 is None}
    made |= {"gradient": solved.gradient, "steps": solved.steps}
    return ProbeAnswers((_rank_by(solved, test),), made)


def _ask_few(
    train: LabelledFeatures, test: LabelledFeatures, classes: int, config: ProbeConfig, shots: int
) -> ProbeAnswers:
    rankings, gradients = [], []
    for seed in range(config.seeds):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(train.labels), generator=generator)
        rows = order[_places_in_class(train.labels[order]) < shots].sort().values
        solved = _fit(train.select_rows(rows), classes, config.few_shot_l2)
        rankings.append(_rank_by(solved, test))
        gradients.append(solved.gradient)
    fewer = int((train.labels.bincount(minlength=classes) < shots).sum())
    means = [float((ranking.ranks < 1).double().mean()) for ranking in rankings]
    made = {"l2": config.few_shot_l2, "gradient": max(gradients), "by_seed": means}
    return ProbeAnswers(tuple(rankings), {**made, "classes_with_fewer_images": fewer})


def _fit(
    data: LabelledFeatures, classes: int, l2: float, start: Regression | None = None
) -> Regression:
    return solve_regression(data.values, data.labels, classes, l2, start=start, device=data.device)


def _rank_by(solved: Regression, test: LabelledFeatures) -> Ranking:
    rows_at_once = max(1, _KEPT // solved.weights.shape[1])
    portions = torch.split(torch.arange(len(test.labels)), rows_at_once)
    return join_rankings(
        rank_targets(solved.compute_scores(test.values[rows]), test.labels[rows], SHOWN)
        for rows in portions
    )


def _places_in_class(labels: Tensor) -> Tensor:
    """Return how many samples of the same class come before each [N]."""
    order = labels.argsort(stable=True)
    starts = torch.cumsum(labels.bincount(), dim=0) - labels.bincount()
    places = torch.empty_like(labels)
    places[order] = torch.arange(len(labels)) - starts[labels[order]]
    return places


MOST_STEPS = 200
_MOST_INNER = 1000
_ROWS = 1 << 14
"""Samples in fp64 at once."""
_MOST_CHANCES = 1 << 27
"""Most probabilities that are kept between products with the Hessian."""
_ENOUGH = 1e-4
"""Share of the expected decrease that a step must give (Armijo)."""


@dataclass(frozen=True)
class Regression:
    weights: Tensor
    """[D, C], fp64."""
    bias: Tensor
    """[C]."""
    gradient: float
    """Its largest absolute entry at the solution."""
    steps: int

    def compute_scores(self, features: Tensor) -> Tensor:
        """Logits [N, C] of features [N, D]."""
        return features.double() @ self.weights + self.bias


def solve_regression(
    features: Tensor,
    labels: Tensor,
    classes: int,
    l2: float,
    *,
    tolerance: float = 1e-7,
    start: Regression | None = None,
    device: str = "cpu",
) -> Regression:
    """Fit features [N, D] to labels [N], until no entry of the gradient exceeds `tolerance`;
    RuntimeError if so many steps do not get there.

    `l2` is, of scikit-learn's C, 1 / (C N); `start` a solution to begin at, as of another l2. It is
    solved on `device`; the solution is on the CPU.
    """
    problem = _Problem(features.to(device), labels.to(device), classes, l2)
    centre = problem.centre.cpu()
    point = torch.zeros(features.shape[1] + 1, classes, dtype=torch.float64)
    if start is not None:
        point[:-1], point[-1] = start.weights, start.bias + centre @ start.weights
    point = point.to(device)
    value, gradient = problem.evaluate(point)
    for steps in range(MOST_STEPS + 1):
        largest = float(gradient.abs().max())
        if largest <= tolerance:
            weights, bias = point[:-1].cpu(), point[-1].cpu()
            return Regression(weights, bias - centre @ weights, largest, steps)
        direction = problem.find_direction(gradient)
        slope, length = float((gradient * direction).sum()), 1.0
        while length > _ENOUGH:
            trial = point + length * direction
            reached, ahead = problem.evaluate(trial)
            # Near the solution a decrease drowns in rounding: a smaller gradient is one too.
            if reached <= value + _ENOUGH * length * slope or ahead.abs().max() < largest:
                break
            length /= 2
        point, value, gradient = trial, reached, ahead
    raise RuntimeError(
        f"the linear probe did not reach a gradient of {tolerance} in {MOST_STEPS} steps (it is "
        f"{largest:.1e})"
    )


class _Problem:
    """The objective, its gradient and its Hessian at the point evaluated last.

    Features are centred, which changes no solution but the bias: that of a CLIP model's share a
    large mean, beside which what tells classes apart is small.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int, l2: float) -> None:
        self._features, self._labels = features, labels
        self.centre = features.mean(dim=0, dtype=torch.float64)
        penalty = [l2] * features.shape[1] + [0.0]
        self._penalty = torch.tensor(penalty, dtype=torch.float64, device=features.device)[:, None]
        self._keep = len(features) * classes <= _MOST_CHANCES
        self._point = torch.empty(0)
        self._chances: list[Tensor] = []

    def evaluate(self, point: Tensor) -> tuple[float, Tensor]:
        """Value and gradient [D + 1, C] at a point [D + 1, C], its last row the bias."""
        loss, gradient = 0.0, torch.zeros_like(point)
        self._point, self._chances = point, []
        for rows, inputs in self._iterate_inputs():
            logs = (inputs @ point).log_softmax(dim=1)
            right = self._labels[rows, None]
            loss -= float(logs.gather(1, right).sum())
            chances = logs.exp()
            if self._keep:
                self._chances.append(chances)
            wrong = chances.scatter_add(1, right, -torch.ones_like(right, dtype=chances.dtype))
            gradient += inputs.T @ wrong
        count = len(self._features)
        penalised = self._penalty * point
        return loss / count + float((penalised * point).sum()) / 2, gradient / count + penalised

    def find_direction(self, gradient: Tensor) -> Tensor:
        """Newton's step, solved for as exactly as the distance to the solution is worth."""
        step, residual = torch.zeros_like(gradient), -gradient
        along, squares = residual, float((residual * residual).sum())
        enough = squares * min(0.25, squares**0.5)
        for _ in range(_MOST_INNER):
            bent = self._multiply_hessian(along)
            size = squares / float((along * bent).sum())
            step, residual = step + size * along, residual - size * bent
            before, squares = squares, float((residual * residual).sum())
            if squares <= enough:
                break
            along = residual + squares / before * along
        return step

    def _multiply_hessian(self, vector: Tensor) -> Tensor:
        product = torch.zeros_like(vector)
        for number, (_, inputs) in enumerate(self._iterate_inputs()):
            chances = self._chances[number] if self._keep else (inputs @ self._point).softmax(dim=1)
            moved = chances * (inputs @ vector)
            product += inputs.T @ (moved - chances * moved.sum(dim=1, keepdim=True))
        return product / len(self._features) + self._penalty * vector

    def _iterate_inputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(numbers, centred features with a last column of 1) of some samples at a time."""
        every = torch.arange(len(self._features), device=self._features.device)
        for rows in torch.split(every, _ROWS):
            centred = self._features[rows].double() - self.centre
            yield rows, torch.cat([centred, torch.ones_like(centred[:, :1])], dim=1)
