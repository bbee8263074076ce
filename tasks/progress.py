"""The callback by which a stage reports its progress; showing it is the caller's business."""

from __future__ import annotations

from typing import Protocol


class Report(Protocol):
    """Called by long work, as often as it likes; the receiver limits the rate."""

    def __call__(self, done: float, total: float, detail: str = "") -> None: ...


def silent(done: float, total: float, detail: str = "") -> None:
    """A `Report` that shows nothing."""
