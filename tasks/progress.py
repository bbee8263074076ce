"""The callback by which a stage reports its progress; sizes and times as text."""

import time
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


def format_duration(seconds: float) -> str:
    """`3d 04:05:06`, without the days when there is none."""
    days, rest = divmod(int(seconds), 86_400)
    clock = time.strftime("%H:%M:%S", time.gmtime(rest))
    return f"{days}d {clock}" if days else clock
