"""Charts as inline SVG, which a page can hold without asking for another file."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tasks.table import element

LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 34
SMALLEST, LARGEST = 3.0, 26.0
"""Radii of the circles of a bubble chart."""
LETTER, LINE = 5.6, 12.0
"""Width of a letter and height of a line of its names."""
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
    circles, names = [], []
    taken = [(frame.x(one.x), frame.x(one.x), frame.y(one.y) + 4) for one in drawn]
    """Left and right end and height of centres and of the names placed so far."""
    # Ours are named first, so that the published ones make way for them.
    for one in sorted(drawn, key=lambda bubble: (bubble.style != "subject", -bubble.y)):
        cx, cy = frame.x(one.x), frame.y(one.y)
        radius = max(SMALLEST, LARGEST * math.sqrt((one.area or 0.0) / largest))
        circles.append((radius, _draw_circle(one, cx, cy, radius)))
        width = len(one.label) * LETTER
        sides = [
            left
            for left in (cx + radius + 4, cx - radius - 4 - width)
            if LEFT <= left <= frame.width - 2 - width
        ]
        left, base = next(
            (left, cy + 4 + far)
            for far in sorted((LINE * n for n in range(-len(taken), len(taken) + 1)), key=abs)
            for left in sides or [LEFT]
            if not any(
                start < left + width and left < end and abs(cy + 4 + far - at) < LINE
                for start, end, at in taken
            )
        )
        taken.append((left, left + width, base))
        if abs(base - 4 - cy) > radius + LINE:  # too far away to see whose name it is
            names.append(element("line", class_="leader", x1=cx, y1=cy, x2=left, y2=base - 4))
        names.append(element("text", one.label, class_=f"name {one.style}", x=left, y=base))
    # The largest are drawn first, so that none hides another.
    parts = [drawing for _, drawing in sorted(circles, key=lambda pair: -pair[0])]
    marks = (step * 10.0**power for power in range(-3, 9) for step in (1, 2, 5))
    return frame.draw_chart(marks, [*parts, *names], "chart bubbles")


def _draw_circle(one: Bubble, x: float, y: float, radius: float) -> Markup:
    style = one.style + (" unknown" if one.area is None else "")
    title = element("title", f"{one.label}: {one.y:.1f}")
    return element("circle", title, class_=style, cx=x, cy=y, r=radius)


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
