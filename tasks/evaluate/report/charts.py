"""Charts as inline SVG, which a page can hold without asking for another file.

Covers: axes and their ticks, lines over common axes, circles with names, one share as a bar.
Not here: which figures are drawn, pictures (pictures.py); colours are CSS classes of the page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 520, 250
WIDE, TALL = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 34
SMALLEST, LARGEST = 3.0, 26.0
"""Radii of the circles of a bubble chart."""


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


@dataclass(frozen=True)
class Bubble:
    """One circle of a bubble chart; `style` is a CSS class of the page."""

    x: float
    y: float
    area: float | None
    """What the circle's area stands for; None draws the smallest circle, dashed."""
    label: str
    style: str


def bubble_chart(bubbles: Sequence[Bubble], *, x: str, y: str) -> Markup:
    """Circles with their names over a logarithmic `x`; the largest always has the same size."""
    drawn = [one for one in bubbles if math.isfinite(one.y) and one.x > 0]
    if not drawn:
        return Markup('<p class="quiet">no points to draw</p>')
    xs = [math.log10(one.x) for one in drawn]
    x_low, x_high = min(xs) - 0.12, max(xs) + 0.12
    y_ticks = ticks(min(one.y for one in drawn), max(one.y for one in drawn), about=6)
    y_low, y_high = y_ticks[0], y_ticks[-1]
    largest = max((one.area or 0.0 for one in drawn), default=0.0) or 1.0

    def across(value: float) -> float:
        share = (math.log10(value) - x_low) / (x_high - x_low)
        return LEFT + share * (WIDE - LEFT - RIGHT)

    def up(value: float) -> float:
        return TALL - BOTTOM - (value - y_low) / (y_high - y_low) * (TALL - TOP - BOTTOM)

    parts = [
        f'<svg class="chart bubbles" viewBox="0 0 {WIDE} {TALL}" role="img" '
        f'aria-label="{escape(y)} over {escape(x)}">'
    ]
    for tick in y_ticks:
        at = up(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDE - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text x="{LEFT - 7}" y="{at + 3.5:.1f}" text-anchor="end">{short(tick)}</text>'
        )
    for tick in (d * 10.0**p for p in range(-3, 9) for d in (1, 2, 5)):
        if x_low <= math.log10(tick) <= x_high:
            parts.append(
                f'<text x="{across(tick):.1f}" y="{TALL - BOTTOM + 15}" '
                f'text-anchor="middle">{short(tick)}</text>'
            )
    parts.append(
        f'<text class="axis" x="{(LEFT + WIDE - RIGHT) / 2}" y="{TALL - 4}" '
        f'text-anchor="middle">{escape(x)}</text>'
    )
    circles = [
        (one, across(one.x), up(one.y), max(SMALLEST, LARGEST * math.sqrt(area / largest)))
        for area, one in sorted(((one.area or 0.0, one) for one in drawn), key=lambda c: -c[0])
    ]
    for one, cx, cy, radius in circles:
        unknown = " unknown" if one.area is None else ""
        parts.append(
            f'<circle class="{escape(one.style)}{unknown}" cx="{cx:.1f}" cy="{cy:.1f}" '
            f'r="{radius:.1f}"><title>{escape(one.label)}: {one.y:.1f}</title></circle>'
        )
    taken = [_Box(cx - r * 0.8, cy - r * 0.8, r * 1.6, r * 1.6) for _, cx, cy, r in circles]
    # Ours are named first, so that the published ones make way for them.
    for one, cx, cy, radius in sorted(circles, key=lambda c: (c[0].style != "subject", c[2])):
        box = _free_place(cx, cy, radius, len(one.label) * 5.6, taken)
        taken.append(box)
        if box.is_apart(cx, cy, radius):
            end = box.left if box.left > cx else box.left + box.width
            parts.append(
                f'<line class="leader" x1="{cx:.1f}" y1="{cy:.1f}" x2="{end:.1f}" '
                f'y2="{box.top + 6:.1f}"/>'
            )
        parts.append(
            f'<text class="name {escape(one.style)}" x="{box.left:.1f}" y="{box.top + 9:.1f}">'
            f"{escape(one.label)}</text>"
        )
    return Markup("".join(parts) + "</svg>")


@dataclass(frozen=True)
class _Box:
    left: float
    top: float
    width: float
    height: float = 12.0

    def overlap(self, other: _Box) -> float:
        """Common area."""
        wide = min(self.left + self.width, other.left + other.width) - max(self.left, other.left)
        high = min(self.top + self.height, other.top + other.height) - max(self.top, other.top)
        return max(0.0, wide) * max(0.0, high)

    def is_apart(self, cx: float, cy: float, radius: float) -> bool:
        """Whether it takes a line to see which circle a name is of."""
        return abs(self.top + 6 - cy) > radius + 10

    def outside(self) -> float:
        """Area beyond the chart's frame."""
        wide = max(0.0, LEFT - self.left) + max(0.0, self.left + self.width - (WIDE - 2))
        high = max(0.0, -self.top) + max(0.0, self.top + self.height - (TALL - BOTTOM))
        return wide * self.height + high * self.width


def _free_place(cx: float, cy: float, radius: float, width: float, taken: Sequence[_Box]) -> _Box:
    """Where a name covers no other: right of its circle, left, below, above, or further off."""
    gap = radius + 4
    places = [
        _Box(left, cy - 6 + dy, width)
        for dy in (0, 10, -10, 20, -20, 32, -32, 46, -46, 60, -60)
        for left in (cx + gap, cx - gap - width, cx - width / 2)
    ]

    def cost(box: _Box) -> float:
        return sum(map(box.overlap, taken)) + 4 * box.outside() + abs(box.top + 6 - cy)

    return min(places, key=cost)


def interval_bar(
    value: float,
    interval: tuple[float, float] | None,
    *,
    published: float | None = None,
    chance: float | None = None,
) -> Markup:
    """One share on a scale from 0 to 1: its interval, what is published, what chance reaches."""
    width, high = 130, 18
    middle = high / 2

    def at(share: float) -> str:
        return f"{4 + share * (width - 8):.1f}"

    parts = [
        f'<svg class="bar" viewBox="0 0 {width} {high}" width="{width}" height="{high}" '
        f'aria-hidden="true"><line class="grid" x1="{at(0)}" x2="{at(1)}" y1="{middle}" '
        f'y2="{middle}"/>'
    ]
    if chance is not None:
        parts.append(f'<line class="chance" x1="{at(chance)}" x2="{at(chance)}" y1="3" y2="15"/>')
    if interval is not None:
        low, top = interval
        parts.append(f'<line class="range" x1="{at(low)}" x2="{at(top)}" y1="9" y2="9"/>')
    if published is not None:
        parts.append(
            f'<rect class="published" x="-3" y="-3" width="6" height="6" '
            f'transform="translate({at(published)} {middle}) rotate(45)"/>'
        )
    parts.append(f'<circle class="subject" cx="{at(value)}" cy="{middle}" r="3.2"/>')
    return Markup("".join(parts) + "</svg>")
