"""How far the downloading processes are, counted URL by URL and readable from outside.

Covers: one small file a shard, overwritten in place; their sum; which process a shard is with.
Not here: showing it; the final counts, which come from the shards themselves (check.py).
"""

from __future__ import annotations

import os
import struct
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tasks.download.outcome import Outcome

_ORDER = tuple(Outcome)
_LAYOUT = struct.Struct(f"<{len(_ORDER) + 1}Q")


@dataclass(frozen=True)
class Progress:
    """What was counted over all shards that were begun."""

    counts: Counter[Outcome]
    """SUCCESS means fetched, not yet decoded."""
    busy: frozenset[int]
    """Ids of the processes that have a shard in hand."""


class OutcomeCounter:
    """Counts the fetches of one shard into its own file; safe for threads."""

    def __init__(self, folder: Path, shard: int) -> None:
        self._file = os.open(folder / f"{shard}.counts", os.O_WRONLY | os.O_CREAT, 0o644)
        self._counts: Counter[Outcome] = Counter()
        self._lock = threading.Lock()
        self._write(os.getpid())

    def add(self, outcome: Outcome) -> None:
        with self._lock:
            self._counts[outcome] += 1
            self._write(os.getpid())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._write(0)
        os.close(self._file)

    def _write(self, process: int) -> None:
        content = _LAYOUT.pack(process, *(self._counts[word] for word in _ORDER))
        os.pwrite(self._file, content, 0)


def read_counters(folder: Path) -> Progress:
    """Sum the files of all shards."""
    counts: Counter[Outcome] = Counter()
    busy: set[int] = set()
    for file in folder.glob("*.counts"):
        content = file.read_bytes()
        if len(content) == _LAYOUT.size:
            process, *numbers = _LAYOUT.unpack(content)
            counts.update(dict(zip(_ORDER, numbers, strict=True)))
            busy |= {process} - {0}
    return Progress(counts, frozenset(busy))
