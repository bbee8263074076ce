"""Multinomial logistic regression with an L2 penalty, solved to a stated gradient.

It minimises the mean cross-entropy of softmax(x W + b) plus l2 / 2 times the squares of W, which
is convex: the solution depends on the data and l2, not on a learning rate, an order or a machine.
Newton's method, whose steps conjugate gradients find (Nocedal and Wright 2006, chapter 7).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_STEPS = 200
_MOST_INNER = 1000
_ROWS = 1 << 14
"""Samples in fp64 at once."""
_KEPT = 1 << 27
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
        self._keep = len(features) * classes <= _KEPT
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
