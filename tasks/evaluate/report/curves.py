"""The losses that the training stages wrote down, as the report shows them."""

import json
from contextlib import suppress
from dataclasses import dataclass
from math import log
from pathlib import Path
from statistics import fmean, median
from typing import Any

from markupsafe import Markup

from evaclip_model.errors import InputError
from tasks.evaluate.report.charts import ChartLine, line_chart

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
    guessing = [(curve.samples[0], log(curve.batch)), (curve.samples[-1], log(curve.batch))]
    lines = [
        ChartLine(guessing, "guessing", "chance"),
        ChartLine(raw[::stride], "each step", "raw"),
        ChartLine(smooth, f"mean of {width} steps", "subject"),
    ]
    return line_chart(lines, x="image-text pairs seen", y="contrastive loss")
