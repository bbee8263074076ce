"""Charts as inline SVG, which a page can hold without asking for another file, and the losses of
training stages that one of them shows.

Where everything lies is computed here, and drawn by macros.html.j2.
"""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from markupsafe import Markup

from evaclip_model.errors import InputError
from tasks.evaluate.report.templates import MACROS

LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 34
SMALLEST, LARGEST = 3.0, 26.0
"""Radii of the circles of a bubble chart."""
LETTER, LINE = 5.6, 12.0
"""Width of a letter and height of a line of its names."""
EMPTY = Markup('<p class="quiet">no points to draw</p>')


class ChartLine(NamedTuple):
    """One line of a chart; `style` is a CSS class of the page."""

    points: Sequence[tuple[float, float]]
    label: str
    style: str


class Bubble(NamedTuple):
    """One circle of a bubble chart; `style` is a CSS class of the page."""

    x: float
    y: float
    area: float | None
    """The quantity that the circle's area stands for; None draws the smallest circle, dashed."""
    label: str
    style: str


class _Placed(NamedTuple):
    of: Bubble
    x: float
    y: float
    radius: float
    left: float
    """Of its name."""
    base: float
    is_far: bool
    """True: its name is too far away to see whose it is."""


@dataclass(frozen=True)
class _Axes:
    """The axes of a chart; x runs from the first to the last of `x_range`, y over its ticks."""

    width: int
    height: int
    x_title: str
    y_title: str
    x_range: tuple[float, float]
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    log_x: bool

    def x(self, value: float) -> float:
        low, high, at = (math.log10(one) if self.log_x else one for one in (*self.x_range, value))
        return LEFT + (at - low) / (high - low) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        bottom = self.height - BOTTOM
        return bottom - (value - low) / (high - low) * (bottom - TOP)


def line_chart(lines: Sequence[ChartLine], *, x: str, y: str) -> Markup:
    """Lines over common axes; `x` and `y` name them. Points that are not finite are left out."""
    finite = [
        line._replace(points=[p for p in line.points if all(map(math.isfinite, p))])
        for line in lines
    ]
    xs, ys = ([point[i] for line in finite for point in line.points] for i in (0, 1))
    if not xs:
        return EMPTY
    low, high = min(xs), max(xs)
    y_ticks = choose_ticks(min(0.0, *ys), max(ys))
    x_range = (low, max(high, low * (1 + 1e-9) + 1e-9))
    axes = _Axes(520, 250, x, y, x_range, choose_ticks(low, high), y_ticks, log_x=False)
    return Markup(MACROS.line_chart(axes, finite))


def choose_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that enclose [low, high]."""
    span = high - low or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / about))
    step = next(m * power for m in (1, 2, 5, 10) if span / (m * power) <= about)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def bubble_chart(bubbles: Sequence[Bubble], *, x: str, y: str) -> Markup:
    """Circles, one at least, with their names over a logarithmic `x`; the largest always has the
    same size."""
    xs, ys = [one.x for one in bubbles], [one.y for one in bubbles]
    x_ticks = [step * 10.0**power for power in range(-3, 9) for step in (1, 2, 5)]
    y_ticks = choose_ticks(min(ys), max(ys), about=6)
    x_range = min(xs) * 10**-0.12, max(xs) * 10**0.12
    axes = _Axes(760, 380, x, y, x_range, x_ticks, y_ticks, log_x=True)
    largest = max(one.area or 0.0 for one in bubbles) or 1.0
    placed = []
    taken = [(axes.x(one.x), axes.x(one.x), axes.y(one.y) + 4) for one in bubbles]
    """Left and right end and height of centres and of the names placed so far."""
    # Ours are named first, so that the published ones make way for them.
    for one in sorted(bubbles, key=lambda bubble: (bubble.style != "subject", -bubble.y)):
        cx, cy = axes.x(one.x), axes.y(one.y)
        radius = max(SMALLEST, LARGEST * math.sqrt((one.area or 0.0) / largest))
        width = len(one.label) * LETTER
        sides = [
            left
            for left in (cx + radius + 4, cx - radius - 4 - width)
            if LEFT <= left <= axes.width - 2 - width
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
        placed.append(
            _Placed(one, cx, cy, radius, left, base, is_far=abs(base - 4 - cy) > radius + LINE)
        )
    return Markup(MACROS.bubble_chart(axes, placed))


SMOOTH = 0.03
"""Window of the smoothed loss, as a share of the curve."""
CURVE_POINTS = 400


@dataclass(frozen=True)
class Curve:
    """The metrics of one training stage, step by step."""

    name: str
    samples: tuple[float, ...]
    """Image-text pairs seen so far."""
    losses: tuple[float, ...]
    batch: float
    """Image-text pairs contrasted in one step."""
    seconds: float
    """Wall time of all steps."""
    images_per_second: float
    """Median over steps."""
    logit_scale: float


def read_curve(path: Path) -> Curve:
    """Read a training stage's `metrics.jsonl`, whose name is in `train.json` beside it; InputError
    if there is no such file, or no step in it."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        raise InputError(f"{path} is missing: a training stage writes it, train first") from None
    steps: list[dict[str, Any]] = []
    for line in lines:
        with suppress(ValueError):  # cut off by a kill
            steps.append(json.loads(line))
    steps = [step for step in steps if {"step", "samples", "loss"} <= step.keys()]
    if not steps:
        raise InputError(f"{path} holds no training step: train again")
    job = path.with_name("train.json")
    named = json.loads(job.read_text())["train"]["name"] if job.is_file() else path.parent.name
    return Curve(
        name=str(named),
        samples=tuple(float(step["samples"]) for step in steps),
        losses=tuple(float(step["loss"]) for step in steps),
        batch=float(steps[-1]["samples"]) / int(steps[-1]["step"]),
        seconds=sum(float(step.get("step_s", 0)) for step in steps),
        images_per_second=median(float(step.get("images_per_second", 0)) for step in steps),
        logit_scale=float(steps[-1].get("logit_scale", float("nan"))),
    )


def loss_chart(curve: Curve) -> Markup:
    """Loss over samples seen, every step and smoothed, and the loss of guessing, ln(batch)."""
    stride = max(1, len(curve.losses) // CURVE_POINTS)
    raw = list(zip(curve.samples, curve.losses, strict=True))
    width = max(1, round(len(raw) * SMOOTH))
    smooth = [
        (curve.samples[at], fmean(curve.losses[max(0, at - width + 1) : at + 1]))
        for at in range(0, len(raw), stride)
    ]
    guessing = [
        (curve.samples[0], math.log(curve.batch)),
        (curve.samples[-1], math.log(curve.batch)),
    ]
    lines = [
        ChartLine(guessing, "guessing", "chance"),
        ChartLine(raw[::stride], "each step", "raw"),
        ChartLine(smooth, f"mean of {width} steps", "subject"),
    ]
    return line_chart(lines, x="image-text pairs seen", y="contrastive loss")
