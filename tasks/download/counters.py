"""Counters of the downloading processes, URL by URL and readable from outside.

Covers: one small file a shard, overwritten in place; their sum; which process a shard is with.
Not here: showing it; the final counts, which come from the shards themselves (check_shards.py).
"""

from __future__ import annotations

import os
import struct
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tasks.download.fetch_outcome import Outcome

_ORDER = tuple(Outcome)
_LAYOUT = struct.Struct(f"<{len(_ORDER) + 2}Q")


@dataclass(frozen=True)
class Progress:
    """What was counted over all shards that were begun."""

    counts: Counter[Outcome] = field(default_factory=Counter)
    """SUCCESS means fetched, not yet decoded."""
    fetched_bytes: int = 0
    busy: frozenset[int] = frozenset()
    """Ids of the processes that have a shard in hand, on the machines where those are."""


class OutcomeCounter:
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

    def __enter__(self) -> Self:
        return self

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
        """The counts of now."""
        total = self._finished
        for file in self._folder.glob("*.counts"):
            content = file.read_bytes()
            if len(content) != _LAYOUT.size:
                continue
            process, fetched_bytes, *numbers = _LAYOUT.unpack(content)
            counts = Counter(dict(zip(_ORDER, numbers, strict=True)))
            busy = frozenset({process} - {0})
            total = _add_progress(total, Progress(counts, fetched_bytes, busy))
            if not process:
                self._finished = _add_progress(self._finished, Progress(counts, fetched_bytes))
                self._shards.append(int(file.stem))
                file.unlink()
        return total


def _add_progress(one: Progress, other: Progress) -> Progress:
    return Progress(
        one.counts + other.counts,
        one.fetched_bytes + other.fetched_bytes,
        one.busy | other.busy,
    )
