"""How far the downloading processes are, counted URL by URL and readable from outside.

Covers: one small file a shard, overwritten in place; their sum.
Not here: showing it; the final counts, which come from the shards themselves (check.py).
"""

from __future__ import annotations

import os
import struct
import threading
from collections import Counter
from pathlib import Path
from typing import Self

from tasks.download.outcome import Outcome

_ORDER = tuple(Outcome)
_LAYOUT = struct.Struct(f"<{len(_ORDER)}Q")


class OutcomeCounter:
    """Counts the fetches of one shard into its own file; safe for threads."""

    def __init__(self, folder: Path, shard: int) -> None:
        self._file = os.open(folder / f"{shard}.counts", os.O_WRONLY | os.O_CREAT, 0o644)
        self._counts: Counter[Outcome] = Counter()
        self._lock = threading.Lock()

    def add(self, outcome: Outcome) -> None:
        with self._lock:
            self._counts[outcome] += 1
            os.pwrite(self._file, _LAYOUT.pack(*(self._counts[word] for word in _ORDER)), 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def read_counters(folder: Path) -> Counter[Outcome]:
    """What was counted so far over all shards; SUCCESS means fetched, not yet decoded."""
    total: Counter[Outcome] = Counter()
    for file in folder.glob("*.counts"):
        content = file.read_bytes()
        if len(content) == _LAYOUT.size:
            total.update(dict(zip(_ORDER, _LAYOUT.unpack(content), strict=True)))
    return total
