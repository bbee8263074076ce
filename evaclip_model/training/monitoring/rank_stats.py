"""What ranks tell each other in every step, in one collective.

Covers: a row of numbers from each rank, seen by all; what follows from the rows alike everywhere.
Not here: gradients (training/engine/engine.py), features (training/loss/contrastive.py).

One sum over a table in which every rank fills its own row costs as much as one over a single
number, and also says which rank was slow, or had features that are no numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class RankRow(NamedTuple):
    """What one rank says of a step."""

    loss: float
    """Mean over its rows, nats."""
    image_to_text_accuracy: float
    text_to_image_accuracy: float
    text_tokens: float
    """Mean length of its captions."""
    finite: float
    """1 when its own features are numbers, else 0."""
    stop: float
    """1 when it was asked to stop, else 0."""
    save_failed: float
    """1 when its part of the last checkpoint could not be written, else 0."""
    data_wait_s: float
    """Seconds it waited for its samples."""
    forward_s: float
    """Seconds of its forward passes: what it does before it has to wait for other ranks."""


@dataclass(frozen=True)
class Together:
    """All ranks' rows, in the order of ranks; the same on every rank."""

    rows: tuple[RankRow, ...]

    def mean(self, name: str) -> float:
        """Mean over ranks of a number."""
        return fmean(getattr(row, name) for row in self.rows)

    @property
    def bad_ranks(self) -> tuple[int, ...]:
        """Ranks with features that are no numbers."""
        return tuple(rank for rank, row in enumerate(self.rows) if not row.finite)

    @property
    def stop(self) -> bool:
        """Some rank was asked to stop."""
        return any(row.stop for row in self.rows)

    @property
    def save_failed(self) -> bool:
        """The last checkpoint could not be written: all ranks are to learn why."""
        return any(row.save_failed for row in self.rows)

    @property
    def slowest(self) -> tuple[int, float, float]:
        """The rank that needed longest before it met the others, its seconds, and the median."""
        own = [row.data_wait_s + row.forward_s for row in self.rows]
        rank = max(range(len(own)), key=own.__getitem__)
        return rank, own[rank], median(own)


def exchange(row: Mapping[str, Tensor | float], device: torch.device) -> Together:
    """Tell all ranks this rank's row, and hear theirs; waits for the device, once.

    Args:
        row: the fields of `RankRow`; tensors [] as they come from the device.
    """
    joined = dist.is_initialized()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
    cells = [
        torch.as_tensor(row[name], dtype=torch.float64, device=device) for name in RankRow._fields
    ]
    table = torch.zeros(ranks, len(cells), dtype=torch.float64, device=device)
    table[rank] = torch.stack(cells)
    if ranks > 1:
        dist.all_reduce(table)
    return Together(tuple(RankRow(*cells) for cells in table.tolist()))


def from_all(value: Any) -> list[Any]:
    """`value` of every rank, in the order of ranks; for what is rare or small."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def is_straggler(slowest_s: float, median_s: float, ratio: float = 1.5) -> bool:
    """Whether one rank keeps the others waiting."""
    return math.isfinite(slowest_s) and slowest_s > ratio * median_s
