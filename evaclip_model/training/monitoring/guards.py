"""Guards of a training: the verdict on a step whose figures are not finite or left their recent
range, the report of such a step's samples, and the watchdog that ends a rank which hangs.

The verdict is a pure function of values that are the same on every rank, so all ranks decide alike
without another word; and of a state that is saved with a checkpoint, so a resumed run decides as
the uninterrupted one did. Not here: going back to a checkpoint (training/trainer.py).
"""

import faulthandler
import json
import math
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, Self

from torch import Tensor

from evaclip_model.files import write_atomically
from evaclip_model.reading.reader import Batch
from evaclip_model.training.config import TrainConfig

LEAST_DEVIATION = 0.01
"""Share of the mean that the deviation counts as at least: a flat line is not a reason to stop."""


class Diverged(RuntimeError):
    """Training no longer makes progress; the message says since when, and what may help."""


class StepVerdict(Enum):
    TAKE = "take"
    DISCARD = "discard"
    ROLL_BACK = "roll back"


class Observed(NamedTuple):
    """Step number `step`, counted from 1, before it is taken; the same on every rank: the loss of
    the global batch in nats, the norm of the whole gradient before clipping."""

    step: int
    loss: float
    grad_norm: float
    finite: bool
    """All features on all ranks are numbers."""
    culprits: str = ""
    """The ranks and samples whose features are not, for a sentence."""

    def has_numbers(self, config: TrainConfig) -> bool:
        """Features, loss and gradient are numbers; fp16's gradient may overflow instead, which is
        how it finds its loss scale."""
        figures = [self.loss] if config.precision == "fp16" else [self.loss, self.grad_norm]
        return self.finite and all(map(math.isfinite, figures))


class Judged(NamedTuple):
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

    def with_value(self, value: float, window: int) -> Self:
        """The mean with one more value, whose weight is 1 / `window` once there were as many."""
        weight = 1 / min(self.count + 1, window)
        distance = value - self.mean
        variance = (1 - weight) * (self.variance + weight * distance**2)
        return type(self)(self.count + 1, self.mean + weight * distance, variance)


@dataclass(frozen=True)
class GuardState:
    """The guards' memory of earlier steps."""

    nonfinite: int = 0
    """Steps in a row, up to now, whose figures were not numbers."""
    rollbacks: int = 0
    """Times that training went back, in the whole stage."""
    loss: Running = Running()
    grad_norm: Running = Running()


def judge_step(state: GuardState, seen: Observed, config: TrainConfig) -> tuple[Judged, GuardState]:
    """Decide on a step; the decision, and the state for the next step. Raises Diverged after more
    than `max_nonfinite_steps` in a row, or more than `max_rollbacks` in all.

    A step whose fp16 gradient overflows is to be taken: the engine then leaves it out, lowers the
    loss scale, and knows when it is low enough to give up.
    """
    if seen.has_numbers(config):
        if math.isfinite(seen.grad_norm):
            return _judge_numbers(replace(state, nonfinite=0), seen, config)
        return Judged(StepVerdict.TAKE, "overflow", f"step {seen.step} overflows fp16"), state
    state = replace(state, nonfinite=state.nonfinite + 1)
    what = f"the gradient's norm is {seen.grad_norm}"
    if not seen.finite:
        what = "features are not finite" + (f" ({seen.culprits})" if seen.culprits else "")
    elif not math.isfinite(seen.loss):
        what = f"the loss is {seen.loss}"
    if state.nonfinite > config.guards.max_nonfinite_steps:
        raise Diverged(
            f"{what} at step {seen.step}, {_count_times(state.nonfinite)} in a row: lower the "
            "learning rate, or train in bf16 or fp32"
        )
    return Judged(StepVerdict.DISCARD, "nonfinite", f"step {seen.step} is not taken: {what}"), state


def _judge_numbers(
    state: GuardState, seen: Observed, config: TrainConfig
) -> tuple[Judged, GuardState]:
    guards, window = config.guards, config.guards.spike_window_steps
    found: list[str] = []
    followed: dict[str, Running] = {}
    for name in ("loss", "grad_norm"):
        running, value = getattr(state, name), getattr(seen, name)
        deviation = max(math.sqrt(running.variance), LEAST_DEVIATION * abs(running.mean))
        limit = running.mean + guards.spike_deviations * deviation
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
    if guards.spike_action != "rollback":
        verdict = StepVerdict.TAKE if guards.spike_action == "log" else StepVerdict.DISCARD
        return Judged(verdict, "spike", reason), state
    if state.rollbacks >= guards.max_rollbacks:
        raise Diverged(
            f"{reason}; training went back {_count_times(state.rollbacks)} before: lower the "
            "learning rate, raise 'guards.spike_deviations', or look at the data around this step"
        )
    rolled = replace(state, rollbacks=state.rollbacks + 1)
    return Judged(StepVerdict.ROLL_BACK, "spike", reason), rolled


def _count_times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


NAMED = 3
"""Samples that a sentence names at most."""


def describe_samples(rank: int, batch: Batch, finite_rows: Tensor) -> dict[str, Any]:
    """A rank's samples of a step, in JSON's types; `finite_rows` [b]: the features of each are
    numbers."""
    rows = zip(
        batch.positions.tolist(), batch.origins, batch.captions, finite_rows.tolist(), strict=True
    )
    samples = [
        {"position": position, "shard": origin.shard, "key": origin.key}
        | {"finite": finite, "caption": caption}
        for position, origin, caption, finite in rows
    ]
    return {"rank": rank, "samples": samples}


def name_culprits(ranks: Sequence[dict[str, Any]]) -> str:
    """Rank, sample and shard of the features that are not finite; empty when all are."""
    bad: list[str] = []
    for rank in ranks:
        samples = [sample for sample in rank["samples"] if not sample["finite"]]
        if samples and len(samples) == len(rank["samples"]):
            bad.append(f"rank {rank['rank']}, all its samples")
            continue
        bad += [f"rank {rank['rank']}, sample {one['key']} of {one['shard']}" for one in samples]
    more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    return "; ".join(bad[:NAMED]) + more


GRACE_S = 5.0
"""Seconds between the stacks and the end."""
HEARTBEAT_S = 10.0
"""Seconds between heartbeats at least: steps may be short, and file systems slow."""
CRASHED = 1
"""Exit code of a rank that hung: that of a crash, after which the newest checkpoint holds."""


class Watchdog:
    """Watches this process; a context: what runs in it must call `report_step` now and then.

    A heartbeat file tells the rank's step; stacks of all threads are written on SIGUSR1, or when
    steps stop. Ranks that wait for a stuck one make no step either: each writes its own stacks, and
    none ends before the others had time to write theirs, because the end of one breaks the
    connections of all.
    """

    def __init__(
        self, run_dir: Path, rank: int, limit_s: float, *, grace_s: float = GRACE_S
    ) -> None:
        """Write the stacks after `limit_s` seconds without a step; end the process `grace_s`
        later."""
        self._grace_s = grace_s
        self._stacks_path = run_dir / f"stacks-{rank}.txt"
        self._heartbeat = run_dir / f"heartbeat-{rank}.json"
        self._limit_s = limit_s
        self._last = time.monotonic()
        self._written = -HEARTBEAT_S
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch_steps, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._stacks = self._stacks_path.open("a")
        faulthandler.register(signal.SIGUSR1, file=self._stacks, all_threads=True)
        self._arm_traceback()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGUSR1)
        self._stacks.close()
        if not self._stacks_path.stat().st_size:
            self._stacks_path.unlink()

    def report_step(self, step: int) -> None:
        """Say that step `step` is done."""
        self._last = time.monotonic()
        self._arm_traceback()
        if self._last - self._written >= HEARTBEAT_S:
            self._written = self._last
            beat = json.dumps({"step": step, "time": time.time()}) + "\n"
            # A step does not wait for the disk; a heartbeat means nothing after a power cut.
            write_atomically(self._heartbeat, beat, sync=False)

    def _arm_traceback(self) -> None:
        # A thread of Python's own does not run while foreign code holds the interpreter; this one
        # does, and ends the process should the thread below not have.
        late = self._limit_s + 2 * self._grace_s
        faulthandler.dump_traceback_later(late, exit=True, file=self._stacks)

    def _watch_steps(self) -> None:
        while not self._ended.wait(self._last + self._limit_s - time.monotonic()):
            if time.monotonic() - self._last < self._limit_s:
                continue
            print(f"no step for {self._limit_s:g} s", file=self._stacks, flush=True)
            faulthandler.dump_traceback(self._stacks, all_threads=True)
            if not self._ended.wait(self._grace_s):
                os._exit(CRASHED)
