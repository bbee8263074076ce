"""The callback by which a stage reports its progress, and sizes as text."""

from typing import Protocol


class Report(Protocol):
    """Called by long work, as often as it likes; the receiver limits the rate."""

    def __call__(self, done: float, total: float, detail: str = "") -> None: ...


def report_nothing(done: float, total: float, detail: str = "") -> None:
    """A `Report` that shows nothing."""


def format_bytes(number: float) -> str:
    """A number of bytes for people, in powers of 1000: `3 kB`, `189 MB`, `50.0 GB`, `1.2 TB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number / 1e6:,.0f} MB" if number >= 1e6 else f"{number / 1e3:,.0f} kB"
