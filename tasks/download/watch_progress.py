"""Progress of a download: the counters of its processes, the line a person sees, and the two
reasons to stop early: our network is down, or the list is mostly dead. Not here: the final counts,
which come from the shards themselves (shards.py)."""

from __future__ import annotations

import os
import struct
import threading
from collections import Counter, deque
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from tasks.download.fetch_outcome import NETWORK, Outcome
from tasks.progress import format_bytes, format_duration

_ORDER = tuple(Outcome)
_LAYOUT = struct.Struct(f"<{len(_ORDER) + 2}Q")
RATE_S = 60.0
"""The speed shown is that of so many last seconds."""
COLLAPSE_URLS = 200
COLLAPSE_S = 5.0
COLLAPSE_SHARE = 0.9
"""The network is down when this share of the last URLs (so many, over so long) fails like it. Hosts
are mixed, so that dead ones cannot look like this; a link that is down for a blink may."""
ABORT_AFTER_URLS = 2_000
"""URLs, already shuffled over the web, after which the success rate is known to about 2 %."""


@dataclass(frozen=True)
class Progress:
    """The counts over all shards that were begun."""

    counts: Counter[Outcome] = field(default_factory=Counter)
    """SUCCESS means fetched, not yet decoded."""
    fetched_bytes: int = 0
    busy: frozenset[int] = frozenset()
    """Ids of the processes that have a shard in hand, on the machines where those are."""

    def __add__(self, other: Progress) -> Progress:
        fetched_bytes = self.fetched_bytes + other.fetched_bytes
        return Progress(self.counts + other.counts, fetched_bytes, self.busy | other.busy)


class OutcomeCounter(AbstractContextManager["OutcomeCounter"]):
    """Counts the fetches of one shard into its own file; safe for threads."""

    def __init__(self, folder: Path, shard: int) -> None:
        self._file = os.open(folder / f"{shard}.counts", os.O_WRONLY | os.O_CREAT, 0o644)
        self._counts: Counter[Outcome] = Counter()
        self._bytes = 0
        self._lock = threading.Lock()
        self._write_counts(os.getpid())

    def count_outcome(self, outcome: Outcome, fetched_bytes: int) -> None:
        with self._lock:
            self._counts[outcome] += 1
            self._bytes += fetched_bytes
            self._write_counts(os.getpid())

    def __exit__(self, *_: object) -> None:
        self._write_counts(0)
        os.close(self._file)

    def _write_counts(self, process: int) -> None:
        numbers = (self._counts[word] for word in _ORDER)
        os.pwrite(self._file, _LAYOUT.pack(process, self._bytes, *numbers), 0)


class CounterReader:
    """Sums the files of a folder; those of finished shards are taken in once and removed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._finished = Progress()
        self._shards: list[int] = []

    def take_finished(self) -> list[int]:
        """Numbers of the shards whose end was seen since the last call, done well or not."""
        taken, self._shards = self._shards, []
        return taken

    def read_counts(self) -> Progress:
        total = self._finished
        for file in self._folder.glob("*.counts"):
            content = file.read_bytes()
            if len(content) != _LAYOUT.size:
                continue
            process, fetched_bytes, *numbers = _LAYOUT.unpack(content)
            counts = Counter(dict(zip(_ORDER, numbers, strict=True)))
            progress = Progress(counts, fetched_bytes, frozenset({process} - {0}))
            total += progress
            if not process:
                self._finished += progress
                self._shards.append(int(file.stem))
                file.unlink()
        return total


class Watch:
    """Looks at one run of the downloader; `rows_done` are those of shards finished before it."""

    def __init__(self, rows_done: int, rows_total: int, min_success_rate: float) -> None:
        self._rows_done = rows_done
        self._rows_total = rows_total
        self._min_success_rate = min_success_rate
        self._seen: deque[tuple[float, Progress]] = deque()

    def take_progress(self, now_s: float, progress: Progress) -> None:
        """Take in what was counted until `now_s` (of any clock that does not go back)."""
        self._seen.append((now_s, progress))
        while len(self._seen) > 2:
            time_s, then = self._seen[1]
            enough = progress.counts.total() - then.counts.total() >= COLLAPSE_URLS
            if not enough or now_s - time_s < RATE_S:
                break
            self._seen.popleft()  # nothing before `then` matters any more

    @property
    def rows_done(self) -> int:
        return min(self._rows_done + self._now.counts.total(), self._rows_total)

    @property
    def _now(self) -> Progress:
        return self._seen[-1][1]

    def progress_line(self) -> str:
        """`12,345 fetched (93.1 %), 4.2 GB, 812 URLs/s, 03:12:40 left`."""
        now, tried = self._now, self._now.counts.total()
        fetched = now.counts[Outcome.SUCCESS]
        share = f" ({fetched / tried:.1%})" if tried else ""
        per_s = self._urls_per_s()
        left = self._rows_total - self.rows_done
        eta = f", {format_duration(left / per_s)} left" if per_s and left else ""
        size = format_bytes(now.fetched_bytes)
        return f"{fetched:,} fetched{share}, {size}, {per_s:.0f} URLs/s{eta}"

    def progress_figures(self) -> dict[str, float]:
        """The same as numbers."""
        now, tried = self._now, self._now.counts.total()
        return {
            "urls_per_s": self._urls_per_s(),
            "success_rate": now.counts[Outcome.SUCCESS] / tried if tried else 0.0,
            "fetched_bytes": float(now.fetched_bytes),
        }

    def _urls_per_s(self) -> float:
        now_s, now = self._seen[-1]
        begin_s, then = next(one for one in self._seen if now_s - one[0] <= RATE_S)
        elapsed_s = now_s - begin_s
        return (now.counts.total() - then.counts.total()) / elapsed_s if elapsed_s > 0 else 0.0

    def network_down(self) -> str | None:
        """Return why every further URL would fail without an answer; None if that is not so."""
        now_s, now = self._seen[-1]
        for time_s, then in reversed(self._seen):
            lately = now.counts - then.counts
            if now_s - time_s >= COLLAPSE_S and lately.total() >= COLLAPSE_URLS:
                return network_trouble(lately)
        return None

    def list_dead(self) -> str | None:
        """Return why the list as a whole cannot give enough images; None if it may."""
        counts = self._now.counts
        needed = counts.total() * self._min_success_rate / 2  # less is beyond doubt
        if counts.total() < ABORT_AFTER_URLS or counts[Outcome.SUCCESS] >= needed:
            return None
        return dead_links(counts, self._min_success_rate)


def network_trouble(counts: Counter[Outcome], silent: int | None = None) -> str | None:
    """The sentence for URLs that nearly all failed as if nothing were connected; else None.

    `silent` hosts that gave images before do not answer either: then it is so whatever the share.
    """
    failed = sum(counts[outcome] for outcome in NETWORK)
    if silent is None and failed < counts.total() * COLLAPSE_SHARE:
        return None
    too = f", and {silent} hosts that gave images before do not answer either" if silent else ""
    drop = "" if silent else " (or, if all these rows are of one dead site, drop that source)"
    return (
        f"the network or its name service is down: {failed:,} of the last {counts.total():,} URLs "
        f"failed without an answer ({_count_reasons(counts, NETWORK)}){too}: mend it{drop} and run "
        "the same command again; what was downloaded is kept"
    )


def dead_links(counts: Counter[Outcome], min_success_rate: float) -> str:
    return (
        f"only {counts[Outcome.SUCCESS]:,} of {counts.total():,} URLs gave an image, less than "
        f"min_success_rate = {min_success_rate:g} "
        f"({_count_reasons(counts, set(counts) - {Outcome.SUCCESS})}): mend the cause (a dead "
        "list, the server, limits) and run the same command again; what did well is kept"
    )


def _count_reasons(counts: Counter[Outcome], wanted: Iterable[Outcome]) -> str:
    chosen = Counter({outcome: counts[outcome] for outcome in wanted if counts[outcome]})
    return ", ".join(f"{number:,} {outcome.value}" for outcome, number in chosen.most_common())
