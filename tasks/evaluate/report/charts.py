"""Charts as inline SVG, which a page can hold without asking for another file.

Covers: axes and their ticks, lines over common axes.
Not here: which figures are drawn, pictures (pictures.py); colours are CSS classes of the page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 34


@dataclass(frozen=True)
class Line:
    """One line of a chart; `style` is a CSS class of the page."""

    points: Sequence[tuple[float, float]]
    label: str
    style: str


def line_chart(lines: Sequence[Line], *, x: str, y: str, log_x: bool = False) -> Markup:
    """Lines over common axes; `x` and `y` name them. Points that are not finite are left out."""
    finite = [
        Line([p for p in line.points if all(map(math.isfinite, p))], line.label, line.style)
        for line in lines
    ]
    points = [point for line in finite for point in line.points]
    if not points:
        return Markup('<p class="quiet">no points to draw</p>')
    xs = [_log(px) if log_x else px for px, _ in points]
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_ticks = ticks(min(0.0, *(py for _, py in points)), max(py for _, py in points))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across = ((_log(point[0]) if log_x else point[0]) - x_low) / (x_high - x_low)
        up = (point[1] - y_low) / (y_high - y_low)
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
        )

    marks = _decades(points) if log_x else [t for t in ticks(x_low, x_high) if x_low <= t <= x_high]
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(y)} over {escape(x)}">'
    ]
    for tick in y_ticks:
        _, at = place((points[0][0], tick))
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        )
        parts.append(
            f'<text x="{LEFT - 7}" y="{at + 3.5:.1f}" text-anchor="end">{short(tick)}</text>'
        )
    for tick in marks:
        at, _ = place((tick, y_low))
        below = HEIGHT - BOTTOM + 15
        parts.append(f'<text x="{at:.1f}" y="{below}" text-anchor="middle">{short(tick)}</text>')
    parts.append(
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" '
        f'text-anchor="middle">{escape(x)}</text>'
    )
    for line in finite:
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in map(place, line.points))
        parts.append(
            f'<polyline class="{escape(line.style)}" points="{path}">'
            f"<title>{escape(line.label)}</title></polyline>"
        )
    return Markup("".join(parts) + "</svg>")


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that enclose [low, high]."""
    span = high - low or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / about))
    step = next(m * power for m in (1, 2, 5, 10) if span / (m * power) <= about)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def short(value: float) -> str:
    """A number as an axis shows it: 0.25, 40, 12k, 2M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _log(value: float) -> float:
    return math.log10(max(value, 1e-12))


def _decades(points: Sequence[tuple[float, float]]) -> list[float]:
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    powers = range(math.ceil(_log(low) - 1e-9), math.floor(_log(high) + 1e-9) + 1)
    return [10.0**power for power in powers]
