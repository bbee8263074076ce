"""Which sample stands at which position of training, as pure arithmetic.

Covers: the exact mix of sources, and each source's seeded order over epochs. Nothing is read.
Not here: files, decoding, batches (reader.py).

A step's global batch is cut into `lanes` equal runs of positions. A lane has its own share of every
source and walks it shard after shard, shuffling windows of samples; so a rank that owns some lanes
reads each of its shards once per epoch and front to back, and nothing depends on how many ranks
there are. Every sample of a source is seen once before any is seen again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

LONGEST_CYCLE = 1000
"""Draws within which the sources' shares are met as closely as they can be."""
EXACT = 1e-9
"""A longer cycle must come closer than this to be worth it."""


@dataclass(frozen=True)
class Piece:
    """Samples `start` to `stop` (exclusive) of one shard, counted in its file's order."""

    shard: int
    start: int
    stop: int


def mixing_pattern(weights: Mapping[str, float]) -> tuple[str, ...]:
    """The shortest cycle of sources with exactly the shares of `weights`, evenly spread.

    {"a": 0.8, "b": 0.2} gives a, a, b, a, a: position q draws from pattern[q mod 5].
    """
    counts = _whole_shares(weights)
    length = sum(counts.values())
    credit = dict.fromkeys(counts, 0)
    pattern = []
    for _ in range(length):
        for name, count in counts.items():
            credit[name] += count
        drawn = max(credit, key=lambda name: credit[name])
        credit[drawn] -= length
        pattern.append(drawn)
    return tuple(pattern)


def _whole_shares(weights: Mapping[str, float]) -> dict[str, int]:
    """Small whole numbers in the proportions of `weights`, as close as a short cycle allows."""
    total = sum(weights.values())
    best: dict[str, int] = {}
    least = float("inf")
    for length in range(len(weights), LONGEST_CYCLE + 1):
        counts = {name: max(1, round(w / total * length)) for name, w in weights.items()}
        drawn = sum(counts.values())
        error = max(abs(counts[name] / drawn - w / total) for name, w in weights.items())
        if error < least - EXACT:
            best, least = counts, error
    return best


class Mixture:
    """Draws of each source, by lane, for a fixed global batch."""

    def __init__(self, weights: Mapping[str, float], global_batch: int, lanes: int) -> None:
        self.sources = tuple(weights)
        self.global_batch = global_batch
        self.per_lane = global_batch // lanes
        self._pattern: Ints = np.array(
            [self.sources.index(name) for name in mixing_pattern(weights)], dtype=np.int64
        )

    def draws(self, step: int, lane: int) -> Ints:
        """Source number of each of the lane's samples in this step, [per_lane]."""
        first = self._first(np.array([step]), lane)[0]
        drawn: Ints = self._pattern[(first + np.arange(self.per_lane)) % len(self._pattern)]
        return drawn

    def drawn_before(self, step: int, lane: int) -> Ints:
        """How often the lane drew from each source in all steps before this one, [sources]."""
        cycle = len(self._pattern) // gcd(len(self._pattern), self.global_batch)
        cycles, rest = divmod(step, cycle)
        whole = self._counted(np.arange(cycle), lane) * cycles if cycles else 0
        return np.asarray(whole + self._counted(np.arange(rest), lane), dtype=np.int64)

    def _counted(self, steps: Ints, lane: int) -> Ints:
        """Draws of each source summed over `steps` (each below one cycle), [sources]."""
        length = len(self._pattern)
        twice = np.eye(len(self.sources), dtype=np.int64)[np.tile(self._pattern, 2)]
        before = np.concatenate([np.zeros_like(twice[:1]), np.cumsum(twice, axis=0)])
        first = self._first(steps, lane)
        rounds, rest = divmod(self.per_lane, length)
        partial = (before[first + rest] - before[first]).sum(axis=0)
        return np.asarray(partial + before[length] * rounds * len(steps))

    def _first(self, steps: Ints, lane: int) -> Ints:
        positions: Ints = steps * self.global_batch + lane * self.per_lane
        return positions % len(self._pattern)


class SourceOrder:
    """One source's order of samples: epoch after epoch, lane by lane.

    In epoch e the shards are permuted by (seed, source, e) and laid end to end; lane l takes the
    l-th of `lanes` equal runs; windows of `window` samples inside it are permuted.
    """

    def __init__(
        self, samples: Sequence[int], *, source: int, lanes: int, window: int, seed: int
    ) -> None:
        self._samples: Ints = np.array(samples, dtype=np.int64)
        self._key = (seed, source)
        self._lanes = lanes
        self._window = window
        self.total = int(self._samples.sum())

    def lane_length(self, lane: int) -> int:
        """Samples of the lane in every epoch."""
        return self._bound(lane + 1) - self._bound(lane)

    def locate(self, lane: int, draw: int) -> tuple[int, int, int]:
        """Epoch, window in the epoch, and place in the window, of the lane's draw number `draw`."""
        epoch, rest = divmod(draw, self.lane_length(lane))
        return epoch, rest // self._window, rest % self._window

    def pieces(self, lane: int, epoch: int, window: int) -> list[Piece]:
        """What the window consists of, in the order of reading."""
        start = self._bound(lane) + window * self._window
        stop = min(start + self._window, self._bound(lane + 1))
        shards = self._rng(0, epoch).permutation(len(self._samples))
        ends = np.cumsum(self._samples[shards])
        found = []
        for place in range(int(np.searchsorted(ends, start, side="right")), len(shards)):
            begin = int(ends[place] - self._samples[shards[place]])
            if begin >= stop:
                break
            low, high = max(start, begin), min(stop, int(ends[place]))
            if low < high:
                found.append(Piece(int(shards[place]), low - begin, high - begin))
        return found

    def shuffled(self, lane: int, epoch: int, window: int) -> Ints:
        """Order in which the window's samples are drawn."""
        left = self.lane_length(lane) - window * self._window
        return self._rng(1, epoch, lane, window).permutation(min(self._window, left))

    def _bound(self, lane: int) -> int:
        return lane * self.total // self._lanes

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence((*self._key, *key))))
