"""How long a rank's own forward passes take.

Covers: seconds in the model's `forward`, summed until they are read.
Not here: what the seconds are used for (rank_stats.py, step_metrics.py).

The whole step takes every rank equally long, because ranks wait for each other. The forward pass
waits for nobody: a rank that is slow here is the slow one.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn


class ForwardClock:
    """Counts the seconds of a module's forward passes, on its device."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._started = 0.0
        self._events: list[tuple[Any, Any]] = []
        module.register_forward_pre_hook(self._start)
        module.register_forward_hook(self._end)

    def read(self) -> float:
        """Seconds since it was read last; on a GPU it waits for the passes to end."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        seconds = self._seconds
        self._events, self._seconds = [], 0.0
        return seconds

    def _start(self, module: nn.Module, inputs: Any) -> None:
        if self._on_gpu:
            event: Any = torch.cuda.Event
            pair = event(enable_timing=True), event(enable_timing=True)
            pair[0].record()
            self._events.append(pair)
        self._started = time.perf_counter()

    def _end(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if self._on_gpu:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._started
