"""The sample at each position of training, as pure arithmetic: the exact mix of sources, and each
source's seeded order. Nothing is read.

A step's global batch is cut into `lanes` equal runs of positions. A lane has its own share of every
source and walks it shard after shard, shuffling windows of samples; so a rank that owns some lanes
reads each of its shards once per epoch and front to back. Ranks cut the same positions anew, in a
lane where need be, so that nothing depends on how many of them there are. In epochs every sample of
a source is seen once before any is seen again; shards drawn with replacement are what the authors
trained with (open_clip's `--dataset-resampled`).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import gcd
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

LONGEST_CYCLE = 1000
"""Draws within which the sources' shares are met as closely as they can be."""
DRAWN_AT_ONCE = 1024
"""Shards that a lane draws with replacement at a time; part of what decides the order."""
_NONE: Ints = np.zeros(0, dtype=np.int64)
EXACT = 1e-9
"""A longer cycle must come closer than this to be worth it."""


class Piece(NamedTuple):
    """Samples `start` to `stop` (exclusive) of one shard, counted in its file's order."""

    shard: int
    start: int
    stop: int


def mixing_pattern(weights: Mapping[str, float]) -> tuple[str, ...]:
    """The shortest cycle of sources with exactly the shares of `weights`, evenly spread: of {"a":
    0.8, "b": 0.2} a, a, b, a, a; position q draws from pattern[q mod 5]."""
    counts = _whole_shares(weights)
    length = sum(counts.values())
    credit = Counter(dict.fromkeys(counts, 0))
    pattern = []
    for _ in range(length):
        credit.update(counts)
        drawn = max(credit, key=credit.__getitem__)
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


def share_of_batch(global_batch: int, rank: int, ranks: int) -> range:
    """Positions of a rank in every step's batch: any two shares differ by one at most."""
    return range(rank * global_batch // ranks, (rank + 1) * global_batch // ranks)


def count_parts(global_batch: int, ranks: int, size: int) -> int | None:
    """Parts of `size` samples that every rank cuts its share into; none where they would not be
    equal ones or, of shares that differ by one, not as many on each."""
    least, rest = divmod(global_batch, ranks)
    parts = -(-(least + (rest > 0)) // size)
    is_even = parts == -(-least // size) if rest else least % size == 0
    return parts if is_even else None


class Mixture:
    """Draws of each source, by lane, for a fixed global batch."""

    def __init__(self, weights: Mapping[str, float], global_batch: int, lanes: int) -> None:
        self.sources = tuple(weights)
        self.global_batch = global_batch
        self.per_lane = global_batch // lanes
        pattern = list(map(self.sources.index, mixing_pattern(weights)))
        self._pattern: Ints = np.array(pattern, dtype=np.int64)

    def cut_lanes(self, share: range) -> Iterator[tuple[int, slice]]:
        """The lanes that positions of a step's batch lie in, and their places in each."""
        for lane in range(share.start // self.per_lane, -(-share.stop // self.per_lane)):
            first = lane * self.per_lane
            yield lane, slice(max(0, share.start - first), min(self.per_lane, share.stop - first))

    def draw_sources(self, step: int, lane: int) -> Ints:
        """Source number of each of the lane's samples in this step, [per_lane]."""
        first = self._find_first_draws(np.array([step]), lane)[0]
        drawn: Ints = self._pattern[(first + np.arange(self.per_lane)) % len(self._pattern)]
        return drawn

    def drawn_before(self, step: int, lane: int) -> Ints:
        """Draws of the lane from each source in all steps before this one, [sources]."""
        cycle = len(self._pattern)
        cycles, rest = divmod(step, cycle)
        whole = self._count_draws(np.arange(cycle), lane) * cycles if cycles else 0
        return np.asarray(whole + self._count_draws(np.arange(rest), lane), dtype=np.int64)

    def _count_draws(self, steps: Ints, lane: int) -> Ints:
        """Draws of each source summed over `steps` (each below one cycle), [sources]."""
        length = len(self._pattern)
        twice = np.eye(len(self.sources), dtype=np.int64)[np.tile(self._pattern, 2)]
        before = np.concatenate([np.zeros_like(twice[:1]), np.cumsum(twice, axis=0)])
        first = self._find_first_draws(steps, lane)
        rounds, rest = divmod(self.per_lane, length)
        partial = (before[first + rest] - before[first]).sum(axis=0)
        return np.asarray(partial + before[length] * rounds * len(steps))

    def _find_first_draws(self, steps: Ints, lane: int) -> Ints:
        """Place in the pattern of the lane's first draw in each step."""
        length = len(self._pattern)
        shared = gcd(length, self.global_batch)
        # Where batch and pattern share a factor a lane would come back to the same places after
        # length / shared steps, and draw some source more than others do: it moves on by one then.
        moved = steps // (length // shared) % shared
        positions: Ints = steps * self.global_batch + lane * self.per_lane + moved
        return positions % length


class _LaidOut(NamedTuple):
    shards: Ints
    ends: Ints
    """Samples up to and with each shard."""

    @property
    def total(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def shards_between(self, start: int, stop: int) -> list[int]:
        """Shards that hold the samples `start` to `stop` (exclusive)."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.ends, stop, side="left"))
        found: list[int] = self.shards[first : last + 1].tolist()
        return found

    def list_pieces(self, start: int, stop: int) -> list[Piece]:
        """The samples `start` to `stop` (exclusive), shard by shard."""
        shards = self.shards_between(start, stop)
        first = int(np.searchsorted(self.ends, start, side="right"))
        ends = self.ends[first : first + len(shards)].tolist()
        begins = [int(self.ends[first - 1]) if first else 0, *ends]
        return [
            Piece(shard, max(start, begin) - begin, min(stop, end) - begin)
            for shard, begin, end in zip(shards, begins, ends, strict=False)
        ]


class SourceOrder:
    """One source's order of samples. In epoch e the shards are permuted by (seed, source, e) and
    laid end to end; lane l takes the l-th of `lanes` equal runs; windows of `window` samples inside
    it, which are loaded as a whole, are permuted. `total` is the samples of the source."""

    def __init__(
        self, samples: Sequence[int], *, source: int, lanes: int, window: int, seed: int
    ) -> None:
        self._samples: Ints = np.array(samples, dtype=np.int64)
        self._key = (seed, source)
        self._lanes = lanes
        self._window = window
        self._newest = (-1, _LaidOut(_NONE, _NONE))
        self._drawn: dict[int, _LaidOut] = {}
        self.total = int(self._samples.sum())

    def lane_length(self, lane: int) -> int:
        """Samples of the lane in every epoch."""
        return self._window_bound(lane + 1) - self._window_bound(lane)

    def locate_draw(self, lane: int, draw: int) -> tuple[int, int, int]:
        """Epoch, window in the epoch, and place in the window, of the lane's draw number `draw`."""
        epoch, rest = divmod(draw, self.lane_length(lane))
        return epoch, rest // self._window, rest % self._window

    def next_window(self, lane: int, epoch: int, window: int) -> tuple[int, int]:
        """Epoch and number of the window after a window."""
        last = (self.lane_length(lane) - 1) // self._window
        return (epoch, window + 1) if window < last else (epoch + 1, 0)

    def list_pieces(self, lane: int, epoch: int, window: int) -> list[Piece]:
        """Parts of the window, in the order of reading."""
        start = self._window_bound(lane) + window * self._window
        stop = min(start + self._window, self._window_bound(lane + 1))
        return self._laid_out(epoch).list_pieces(start, stop)

    def shuffle_window(self, lane: int, epoch: int, window: int) -> Ints:
        """Order in which the window's samples are drawn."""
        left = self.lane_length(lane) - window * self._window
        draw = _seed_generator(*self._key, 1, epoch, lane, window)
        return draw.permutation(min(self._window, left))

    def shards_from(self, lane: int, epoch: int, window: int, count: int) -> list[int]:
        """The next `count` shards that the lane reads, from the window's first on."""
        start = self._window_bound(lane) + window * self._window
        found = self._laid_out(epoch).shards_between(start, self._window_bound(lane + 1))[:count]
        if len(found) < count:
            found += self.shards_from(lane, epoch + 1, 0, count - len(found))
        return found

    def _laid_out(self, epoch: int) -> _LaidOut:
        number, laid = self._newest
        if number != epoch:
            shards = _seed_generator(*self._key, 0, epoch).permutation(len(self._samples))
            laid = _LaidOut(shards, np.cumsum(self._samples[shards]))
            self._newest = (epoch, laid)
        return laid

    def _window_bound(self, lane: int) -> int:
        return lane * self.total // self._lanes


class ResampledOrder(SourceOrder):
    """The order when every lane draws its shards with replacement, in one endless epoch, number 0:
    the samples of its drawn shards laid end to end, in windows that are permuted."""

    def locate_draw(self, lane: int, draw: int) -> tuple[int, int, int]:
        return 0, draw // self._window, draw % self._window

    def next_window(self, lane: int, epoch: int, window: int) -> tuple[int, int]:
        return epoch, window + 1

    def list_pieces(self, lane: int, epoch: int, window: int) -> list[Piece]:
        start, stop = window * self._window, (window + 1) * self._window
        return self._lay_out_until(lane, stop).list_pieces(start, stop)

    def shuffle_window(self, lane: int, epoch: int, window: int) -> Ints:
        return _seed_generator(*self._key, 1, lane, window).permutation(self._window)

    def shards_from(self, lane: int, epoch: int, window: int, count: int) -> list[int]:
        start = window * self._window
        most = count * int(self._samples.max())
        return self._lay_out_until(lane, start + most).shards_between(start, start + most)[:count]

    def _lay_out_until(self, lane: int, stop: int) -> _LaidOut:
        """The lane's shards from the first on, at least `stop` samples of them."""
        # Sizes differ, so where a shard begins is known only by adding up all before it.
        laid = self._drawn.get(lane, _LaidOut(_NONE, _NONE))
        while laid.total < stop:
            block = _seed_generator(*self._key, 0, lane, len(laid.shards) // DRAWN_AT_ONCE)
            drawn = block.integers(0, len(self._samples), DRAWN_AT_ONCE)
            shards = np.concatenate([laid.shards, drawn])
            self._drawn[lane] = laid = _LaidOut(shards, np.cumsum(self._samples[shards]))
        return laid


ORDERS: Mapping[str, type[SourceOrder]] = {"exact": SourceOrder, "resampled": ResampledOrder}
"""Kind of sampling -> the order of a source under it."""


def _seed_generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
