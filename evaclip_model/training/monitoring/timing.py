"""Clocks for the parts of a training step.

Covers: a stopwatch; seconds in the model's own forward passes; a window of steps under torch's
profiler.
Not here: the use of the seconds (metrics.py).

The whole step takes every rank equally long, because ranks wait for each other. The forward pass
waits for nobody: a rank that is slow here is the slow one.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

PROFILE_FOLDER = "profile"


class Stopwatch:
    """Seconds from one question to the next."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def take_lap(self) -> float:
        """Seconds since it was asked last."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds


class ForwardClock:
    """Counts the seconds of a module's forward passes, on its device."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._started = 0.0
        self._events: list[tuple[Any, Any]] = []
        module.register_forward_pre_hook(self._on_forward_start)
        module.register_forward_hook(self._on_forward_end)

    def take_seconds(self) -> float:
        """Seconds since it was read last; on a GPU it waits for the passes to end."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        seconds = self._seconds
        self._events, self._seconds = [], 0.0
        return seconds

    def _on_forward_start(self, module: nn.Module, inputs: Any) -> None:
        if self._on_gpu:
            event: Any = torch.cuda.Event
            pair = event(enable_timing=True), event(enable_timing=True)
            pair[0].record()
            self._events.append(pair)
        self._started = time.perf_counter()

    def _on_forward_end(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if self._on_gpu:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._started


class ProfileWindow:
    """Records the steps `first` to `last`, counted from 1, of the process it is in."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path) -> None:
        """Args:
        steps: first and last; none: records nothing.
        """
        self._first, self._last = steps or (0, 0)
        self._folder = folder
        self._profile: profile | None = None

    def before_step(self, step: int) -> None:
        """Call before step `step`."""
        if step == self._first:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities, profile_memory=True)
            self._profile.start()

    def after_step(self, step: int) -> None:
        """Call after it; writes `steps-FIRST-LAST.json` after the last."""
        if self._profile is not None and step >= self._last:
            self._profile.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            trace = self._folder / f"steps-{self._first}-{step}.json"
            self._profile.export_chrome_trace(str(trace))
            self._profile = None
