"""Numbers as people read them."""

from collections.abc import Sequence

from tasks.table import NOTHING


def format_percent(share: float | None) -> str:
    """A share as people read it: 6.21 %, 0.07 %, 100 %."""
    if share is None:
        return NOTHING
    digits = 2 if share < 0.1 else 1
    return f"{100 * share:.{digits}f} %" if share < 1 else "100 %"


def format_interval(bounds: Sequence[float] | None) -> str:
    """A range of shares: 5.12 – 7.51 %."""
    if bounds is None:
        return NOTHING
    low, high = (format_percent(value).removesuffix(" %") for value in bounds)
    return f"{low} – {high} %"


def format_points(value: float | None) -> str:
    """Percentage points or percents without a sign before positive ones: 2.3, −1.0."""
    return NOTHING if value is None else f"{value:.1f}".replace("-", "−")


def format_signed(points: float | None, digits: int = 1) -> str:
    """A difference in percentage points: +0.3, −1.2, 0.0."""
    if points is None:
        return NOTHING
    text = f"{abs(points):.{digits}f}"
    sign = "" if float(text) == 0 else "+" if points > 0 else "−"
    return sign + text


def p_value(p: float | None) -> str:
    """A p-value with the digits that matter: 0.31, 0.012, < 0.001."""
    if p is None:
        return NOTHING
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def format_size(count: float, digits: int = 0) -> str:
    """A large count as the paper prints it: 149M, 13B; with digits, from a billion on: 1.0B."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.{digits if unit >= 1e9 else 0}f}{name}"
    return f"{count:.0f}"


def format_short(value: float) -> str:
    """A number as an axis shows it: 0.25, 40, 12k, 2M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def format_plural(count: int, noun: str, plural_noun: str | None = None) -> str:
    """A count with its noun: 1 set, 33 sets, 2 classes."""
    return f"{count:,} {noun if count == 1 else plural_noun or noun + 's'}"
