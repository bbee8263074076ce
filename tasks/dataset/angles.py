"""Features within an angle of each other, found exactly: the same ones on every machine.

A feature's numbers are float16, multiples of 2^-24, and its length is 1 but for their rounding. A
product of two is a multiple of 2^-48, and no sum of some of them reaches 2: float64 holds each one
without rounding, in whatever order a library adds. `are_within` therefore compares an exact dot
product with a bound of one square root and two products, which IEEE 754 rounds in one way. Float32
decides first wherever its largest error cannot change the answer. Not here: files (semantic.py).
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

TILE, WIDTH = 1024, 2048
"""Features that are compared at once: 8 MB of dot products."""


def cosine_of(degrees: float) -> float:
    """Cosine in steps of 2^-40, in which no mathematical library differs from another."""
    return round(math.cos(math.radians(degrees)) * 2**40) / 2**40


def are_within(left: Tensor, right: Tensor, cosine: float) -> Tensor:
    """Tell of each pair of rows [N, D], float16, whether its angle has at least this cosine."""
    left, right = left.double(), right.double()
    lengths = (left.square().sum(dim=1) * right.square().sum(dim=1)).sqrt()
    return (left * right).sum(dim=1) >= lengths * cosine


def find_outranked(
    better_ranks: Tensor, better: Tensor, ranks: Tensor, features: Tensor, cosine: float
) -> Tensor:
    """Mask [N] of the features [N, D] within the angle of a `better` one [B, D] of lower rank; all
    are float16, in ascending order of their ranks."""
    doubt = _largest_error(features)
    found = torch.zeros(len(ranks), dtype=torch.bool, device=ranks.device)
    for start in range(0, len(better), TILE):
        tile, numbers = better[start : start + TILE], better_ranks[start : start + TILE]
        left = torch.nonzero(~found & (ranks > numbers[0])).flatten()
        for some in torch.split(left, WIDTH) if len(left) else ():
            asked = features[some]
            dots = _unit(tile) @ _unit(asked).T
            if ranks[some[0]] <= numbers[-1]:
                dots.masked_fill_(numbers[:, None] >= ranks[some], -2.0)
            best = dots.amax(dim=0)
            found[some[best > cosine + doubt]] = True
            open_ = torch.nonzero((best - cosine).abs() <= doubt).flatten()
            close = dots[:, open_] >= cosine - doubt
            while len(open_):  # the best-ranked one that is left, for each
                first = close.int().argmax(dim=0)
                hit = are_within(tile[first], asked[open_], cosine)
                found[some[open_[hit]]] = True
                close[first, torch.arange(len(open_), device=first.device)] = False
                again = ~hit & close.any(dim=0)
                open_, close = open_[again], close[:, again]
    return found


def bound_guests(centres: Tensor, degrees: float) -> Tensor:
    """The most [C, C] by which a guest of one cell may be nearer to the centre of its home.

    Every pair within the angle shall meet in a cell that is the home of one of both. A feature's
    home is that of the nearest centre a; it is a guest in the cell of b, if its angle to the plane
    between a and b is at most half of `degrees`. That is enough. Let w be a - b. The signed angle
    of a unit vector z to the plane, asin(z · w / |w|), changes by no more than z turns. If x is at
    home with a, y with b, and both within the angle, then it is at most `degrees` less at y than at
    x. So x's angle from the plane on a's side and y's on b's add up to at most `degrees`, and one
    of the two is at most half of it. Nothing depends on which centres there are, or on which is
    called the nearest. Float32's largest error is added to all bounds.
    """
    slack, unit = _largest_error(centres), _unit(centres)
    apart = (unit @ unit.T).mul_(-2).add_(2 + 2 * slack).clamp_(min=0).sqrt_()
    return apart.mul_(math.sin(math.radians(degrees / 2))).add_(slack)


def find_cells(features: Tensor, centres: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(row, cell, whether that is its home) of every stay [M] of features [N, D] in cells."""
    unit, found = _unit(centres), []
    step = max(1, TILE * WIDTH // len(centres))
    for start in range(0, len(features), step):
        near = _unit(features[start : start + step]) @ unit.T
        best, home = near.max(dim=1)
        row, cell = torch.nonzero(best[:, None] - near <= bounds[home], as_tuple=True)
        found.append((row + start, cell, cell == home[row]))
    rows, cells, homes = (torch.cat(each) for each in zip(*found, strict=True))
    return rows, cells, homes


def _unit(features: Tensor) -> Tensor:
    return normalize(features.float())


def _largest_error(features: Tensor) -> float:
    """Of a float32 dot product of features, added in any order, and divided by their lengths."""
    return float((features.shape[1] + 16) * 2**-23)
