"""A running mean of the weights, cut over ranks as the fp32 masters are.

Covers: keeping it, step by step.
Not here: storing it (it is one more tensor of every fragment), putting it together
(training/engine/gather_weights.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class RunningMean:
    """mean <- decay * mean + (1 - decay) * master, after every step that was taken.

    Attributes:
        means: one fp32 tensor for each master, in their order; to read, or to fill.
    """

    def __init__(self, masters: Sequence[Tensor], decay: float) -> None:
        """Start at the masters as they are; they are kept, and read again at each `follow`."""
        self._masters = list(masters)
        self._decay = decay
        self.means = [master.detach().clone() for master in self._masters]

    def follow(self) -> None:
        """Take in the masters of a step."""
        if self.means:
            torch._foreach_lerp_(self.means, self._masters, 1 - self._decay)
