"""Charts as inline SVG, which a page can hold without asking for another file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tasks.table import element

LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 34
SMALLEST, LARGEST = 3.0, 26.0
"""Radii of the circles of a bubble chart."""
EMPTY = Markup('<p class="quiet">no points to draw</p>')


@dataclass(frozen=True)
class ChartLine:
    """One line of a chart; `style` is a CSS class of the page."""

    points: Sequence[tuple[float, float]]
    label: str
    style: str


@dataclass(frozen=True)
class Bubble:
    """One circle of a bubble chart; `style` is a CSS class of the page."""

    x: float
    y: float
    area: float | None
    """The quantity that the circle's area stands for; None draws the smallest circle, dashed."""
    label: str
    style: str


@dataclass(frozen=True)
class _Frame:
    """The axes of a chart; x runs from the first to the last of `x_range`, y over its ticks."""

    width: int
    height: int
    x_title: str
    y_title: str
    x_range: tuple[float, float]
    y_ticks: Sequence[float]
    log_x: bool

    def x(self, value: float) -> float:
        low, high, at = (_log10(one) if self.log_x else one for one in (*self.x_range, value))
        return LEFT + (at - low) / (high - low) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        bottom = self.height - BOTTOM
        return bottom - (value - low) / (high - low) * (bottom - TOP)

    def draw_chart(self, x_ticks: Iterable[float], parts: Iterable[Markup], style: str) -> Markup:
        grid = []
        for tick in self.y_ticks:
            y = self.y(tick)
            grid += [
                element("line", class_="grid", x1=LEFT, x2=self.width - RIGHT, y1=y, y2=y),
                element("text", format_short(tick), x=LEFT - 7, y=y + 3.5, text_anchor="end"),
            ]
        below = self.height - BOTTOM + 15
        marks = [
            element("text", format_short(one), x=self.x(one), y=below, text_anchor="middle")
            for one in x_ticks
            if self.x_range[0] <= one <= self.x_range[1]
        ]
        middle = (LEFT + self.width - RIGHT) / 2
        title = element(
            "text", self.x_title, class_="axis", x=middle, y=self.height - 4, text_anchor="middle"
        )
        return element(
            "svg",
            *(*grid, *marks, title, *parts),
            class_=style,
            viewBox=f"0 0 {self.width} {self.height}",
            role="img",
            aria_label=f"{self.y_title} over {self.x_title}",
        )


def line_chart(lines: Sequence[ChartLine], *, x: str, y: str, log_x: bool = False) -> Markup:
    """Lines over common axes; `x` and `y` name them. Points that are not finite are left out."""
    finite = [
        ChartLine([p for p in line.points if all(map(math.isfinite, p))], line.label, line.style)
        for line in lines
    ]
    points = [point for line in finite for point in line.points]
    if not points:
        return EMPTY
    low, high = min(px for px, _ in points), max(px for px, _ in points)
    y_ticks = choose_ticks(min(0.0, *(py for _, py in points)), max(py for _, py in points))
    frame = _Frame(520, 250, x, y, (low, max(high, low * (1 + 1e-9) + 1e-9)), y_ticks, log_x)
    drawn = [
        element(
            "polyline",
            element("title", line.label),
            class_=line.style,
            points=" ".join(f"{frame.x(px):.1f},{frame.y(py):.1f}" for px, py in line.points),
        )
        for line in finite
    ]
    marks = [10.0**power for power in range(-12, 13)] if log_x else choose_ticks(low, high)
    return frame.draw_chart(marks, drawn, "chart")


def choose_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that enclose [low, high]."""
    span = high - low or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / about))
    step = next(m * power for m in (1, 2, 5, 10) if span / (m * power) <= about)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def format_short(value: float) -> str:
    """A number as an axis shows it: 0.25, 40, 12k, 2M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _log10(value: float) -> float:
    return math.log10(max(value, 1e-12))


def bubble_chart(bubbles: Sequence[Bubble], *, x: str, y: str) -> Markup:
    """Circles with their names over a logarithmic `x`; the largest always has the same size."""
    drawn = [one for one in bubbles if math.isfinite(one.y) and one.x > 0]
    if not drawn:
        return EMPTY
    xs, ys = [one.x for one in drawn], [one.y for one in drawn]
    x_range = min(xs) * 10**-0.12, max(xs) * 10**0.12
    frame = _Frame(760, 380, x, y, x_range, choose_ticks(min(ys), max(ys), about=6), log_x=True)
    largest = max(one.area or 0.0 for one in drawn) or 1.0
    circles = [
        _Circle(
            one,
            frame.x(one.x),
            frame.y(one.y),
            max(SMALLEST, LARGEST * math.sqrt((one.area or 0.0) / largest)),
        )
        for one in sorted(drawn, key=lambda one: -(one.area or 0.0))
    ]
    parts = [
        element(
            "circle",
            element("title", f"{one.bubble.label}: {one.bubble.y:.1f}"),
            class_=one.bubble.style + (" unknown" if one.bubble.area is None else ""),
            cx=one.x,
            cy=one.y,
            r=one.radius,
        )
        for one in circles
    ]
    taken = [one.inner_box() for one in circles]
    # Ours are named first, so that the published ones make way for them.
    for one in sorted(circles, key=lambda c: (c.bubble.style != "subject", c.y)):
        box = _place_name(one, frame, taken)
        taken.append(box)
        if abs(box.top + 6 - one.y) > one.radius + 10:  # too far away to see whose name it is
            end = box.left if box.left > one.x else box.left + box.width
            parts.append(
                element("line", class_="leader", x1=one.x, y1=one.y, x2=end, y2=box.top + 6)
            )
        style = f"name {one.bubble.style}"
        parts.append(element("text", one.bubble.label, class_=style, x=box.left, y=box.top + 9))
    marks = (step * 10.0**power for power in range(-3, 9) for step in (1, 2, 5))
    return frame.draw_chart(marks, parts, "chart bubbles")


@dataclass(frozen=True)
class _Circle:
    bubble: Bubble
    x: float
    y: float
    radius: float

    def inner_box(self) -> _Box:
        """The part of the circle that no name may cover."""
        reach = 0.8 * self.radius
        return _Box(self.x - reach, self.y - reach, 2 * reach, 2 * reach)


@dataclass(frozen=True)
class _Box:
    left: float
    top: float
    width: float
    height: float = 12.0

    def overlap_area(self, other: _Box) -> float:
        wide = min(self.left + self.width, other.left + other.width) - max(self.left, other.left)
        high = min(self.top + self.height, other.top + other.height) - max(self.top, other.top)
        return max(0.0, wide) * max(0.0, high)


def _place_name(circle: _Circle, frame: _Frame, taken: Sequence[_Box]) -> _Box:
    """A place for a name that covers no other: beside its circle, below, above, or further off."""
    gap, width = circle.radius + 4, len(circle.bubble.label) * 5.6
    inside = _Box(LEFT, 0, frame.width - 2 - LEFT, frame.height - BOTTOM)
    places = [
        _Box(left, circle.y - 6 + dy, width)
        for dy in (0, 10, -10, 20, -20, 32, -32, 46, -46, 60, -60)
        for left in (circle.x + gap, circle.x - gap - width, circle.x - width / 2)
    ]

    def cost(box: _Box) -> float:
        outside = box.width * box.height - box.overlap_area(inside)
        far = abs(box.top + 6 - circle.y)
        return round(
            sum(map(box.overlap_area, taken)) + 4 * outside + far, 6
        )  # equal ones: the first

    return min(places, key=cost)


def interval_bar(
    value: float,
    interval: tuple[float, float] | None,
    *,
    published: float | None = None,
    chance: float | None = None,
) -> Markup:
    """One share on a scale from 0 to 1: its interval, the published figure, chance."""
    width, high, middle = 130, 18, 9

    def at(share: float) -> float:
        return 4 + share * (width - 8)

    def line(style: str, x1: float, x2: float, y1: int = middle, y2: int = middle) -> Markup:
        return element("line", class_=style, x1=at(x1), x2=at(x2), y1=y1, y2=y2)

    parts = [line("grid", 0, 1)]
    if chance is not None:
        parts.append(line("chance", chance, chance, 3, 15))
    if interval is not None:
        parts.append(line("range", *interval))
    if published is not None:
        turned = f"translate({at(published):.1f} {middle}) rotate(45)"
        parts.append(
            element("rect", class_="published", x=-3, y=-3, width=6, height=6, transform=turned)
        )
    parts.append(element("circle", class_="subject", cx=at(value), cy=middle, r=3.2))
    return element(
        "svg",
        *parts,
        class_="bar",
        viewBox=f"0 0 {width} {high}",
        width=width,
        height=high,
        aria_hidden="true",
    )
