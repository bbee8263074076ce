"""Guards against steps whose figures are not finite, or left their recent range.

Covers: the verdict on a step, what the verdicts after it depend on, and that as JSON.
Not here: measuring, going back to a checkpoint, naming samples, files (training/trainer.py,
nonfinite_report.py).

Everything is a pure function of values that are the same on every rank, so all ranks decide alike
without another word; and of a state that is saved with a checkpoint, so a resumed run decides as
the uninterrupted one did.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Any

from evaclip_model.training.config import TrainConfig

LEAST_DEVIATION = 0.01
"""Share of the mean that the deviation counts as at least: a flat line is no reason to stop."""


class Diverged(RuntimeError):
    """Training no longer makes progress; the message says since when, and what may help."""


class StepVerdict(Enum):
    """The guards' decision on a step."""

    TAKE = "take"
    DISCARD = "discard"
    ROLL_BACK = "roll back"


@dataclass(frozen=True)
class Observed:
    """A step before it is taken; the same on every rank."""

    step: int
    """Number of the step, counted from 1."""
    loss: float
    """Mean over the global batch, nats."""
    grad_norm: float
    """Of the whole gradient, before clipping."""
    finite: bool
    """All features on all ranks are numbers."""
    culprits: str = ""
    """The ranks and samples whose features are not, for a sentence."""

    def has_numbers(self, config: TrainConfig) -> bool:
        """Features, loss and gradient are numbers; fp16's gradient may overflow instead, which is
        how it finds its loss scale."""
        return (
            self.finite
            and math.isfinite(self.loss)
            and (config.precision == "fp16" or math.isfinite(self.grad_norm))
        )


@dataclass(frozen=True)
class Judged:
    """A verdict, and why it is not simply to take the step."""

    verdict: StepVerdict
    kind: str = ""
    """"nonfinite", "overflow", "spike", or empty."""
    reason: str = ""


@dataclass(frozen=True)
class Running:
    """Mean and variance of the recent values of a figure: all of them at first, later a window."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def spike_limit(self, deviations: float) -> float:
        """The largest value that is not a spike yet."""
        least = LEAST_DEVIATION * abs(self.mean)
        return self.mean + deviations * max(math.sqrt(self.variance), least)

    def with_value(self, value: float, window: int) -> Running:
        """With one more value, whose weight is 1 / `window` once there were as many."""
        weight = 1 / min(self.count + 1, window)
        distance = value - self.mean
        variance = (1 - weight) * (self.variance + weight * distance**2)
        return Running(self.count + 1, self.mean + weight * distance, variance)


@dataclass(frozen=True)
class GuardState:
    """The guards' memory of earlier steps."""

    nonfinite: int = 0
    """Steps in a row, up to now, whose figures were no numbers."""
    rollbacks: int = 0
    """Times that training went back, in the whole stage."""
    loss: Running = field(default_factory=Running)
    grad_norm: Running = field(default_factory=Running)

    def as_json(self) -> dict[str, Any]:
        """Values for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> GuardState:
        """The state that `as_json` was called on; of an empty mapping, the one to begin with."""
        running = {name: Running(**values[name]) for name in ("loss", "grad_norm") if values}
        return cls(**{**values, **running})


def judge_step(state: GuardState, seen: Observed, config: TrainConfig) -> tuple[Judged, GuardState]:
    """Decide on a step; the decision, and the state for the next step.

    A step whose fp16 gradient overflows is to be taken: the engine then leaves it out, lowers the
    loss scale, and knows when it is low enough to give up.

    Raises:
        Diverged: more than `max_nonfinite_steps` in a row, or more than `max_rollbacks` in all.
    """
    if seen.has_numbers(config):
        if math.isfinite(seen.grad_norm):
            return _judge_numbers(replace(state, nonfinite=0), seen, config)
        return Judged(StepVerdict.TAKE, "overflow", f"step {seen.step} overflows fp16"), state
    state = replace(state, nonfinite=state.nonfinite + 1)
    what = _name_nonfinite(seen)
    if state.nonfinite > config.guards.max_nonfinite_steps:
        raise Diverged(
            f"{what} at step {seen.step}, {_count_times(state.nonfinite)} in a row: lower the "
            f"learning "
            "rate, or train in bf16 or fp32"
        )
    return Judged(StepVerdict.DISCARD, "nonfinite", f"step {seen.step} is not taken: {what}"), state


def _judge_numbers(
    state: GuardState, seen: Observed, config: TrainConfig
) -> tuple[Judged, GuardState]:
    window, deviations = config.guards.spike_window_steps, config.guards.spike_deviations
    found: list[str] = []
    followed = {}
    for name, running, value in (
        ("loss", state.loss, seen.loss),
        ("grad_norm", state.grad_norm, seen.grad_norm),
    ):
        limit = running.spike_limit(deviations)
        spiked = running.count >= window and value > limit
        if spiked:
            found.append(
                f"{name.replace('_', ' ')} {value:.4g}, lately {running.mean:.4g} and up to "
                f"{limit:.4g}"
            )
        # A spike moves the mean as the largest allowed value would: it does not hide the next one,
        # and a level that has changed for good is normal after a while.
        followed[name] = running.with_value(limit if spiked else value, window)
    state = replace(state, loss=followed["loss"], grad_norm=followed["grad_norm"])
    if not found:
        return Judged(StepVerdict.TAKE), state
    reason = f"spike at step {seen.step}: {' and '.join(found)}"
    if config.guards.spike_action == "log":
        return Judged(StepVerdict.TAKE, "spike", reason), state
    if config.guards.spike_action == "skip":
        return Judged(StepVerdict.DISCARD, "spike", reason), state
    if state.rollbacks >= config.guards.max_rollbacks:
        raise Diverged(
            f"{reason}; training went back {_count_times(state.rollbacks)} before: lower the "
            f"learning "
            "rate, raise 'guards.spike_deviations', or look at the data around this step"
        )
    rolled = replace(state, rollbacks=state.rollbacks + 1)
    return Judged(StepVerdict.ROLL_BACK, "spike", reason), rolled


def _name_nonfinite(seen: Observed) -> str:
    if not seen.finite:
        culprits = f" ({seen.culprits})" if seen.culprits else ""
        return f"features are not finite{culprits}"
    if not math.isfinite(seen.loss):
        return f"the loss is {seen.loss}"
    return f"the gradient's norm is {seen.grad_norm}"


def _count_times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
