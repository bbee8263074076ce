"""Numbers as people read them.

Covers: shares, intervals, ratios, ranks, p-values as words.
Not here: which numbers are shown.
"""

from __future__ import annotations


def percent(value: float) -> str:
    """A share as people read it: 6.21 %, 0.07 %, 100 %."""
    digits = 2 if value < 0.1 else 1
    return f"{100 * value:.{digits}f} %" if value < 1 else "100 %"


def interval(bounds: tuple[float, float]) -> str:
    """A range of shares: 5.12 – 7.51 %."""
    low, high = (percent(value).removesuffix(" %") for value in bounds)
    return f"{low} – {high} %"


def times(value: float, chance: float) -> str:
    """How many times chance a share is."""
    ratio = value / chance
    return f"{ratio:.0f} ×" if ratio >= 10 else f"{ratio:.1f} ×"


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, 11th, 1,021st."""
    teens = number % 100 in (11, 12, 13)
    suffix = "th" if teens else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number:,}{suffix}"
