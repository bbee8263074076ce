"""A window of steps under torch's profiler.

Covers: recording some steps of rank 0 into a chrome trace.
Not here: figures of every step (step_metrics.py).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

PROFILE_FOLDER = "profile"


class ProfileWindow:
    """Records the steps `first` to `last`, counted from 1, of the process it is in."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path) -> None:
        """Args:
        steps: first and last; none: records nothing.
        """
        self._first, self._last = steps or (0, 0)
        self._folder = folder
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Call before step `step`."""
        if step == self._first:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities, profile_memory=True)
            self._profile.start()

    def after(self, step: int) -> None:
        """Call after it; writes `steps-FIRST-LAST.json` after the last."""
        if self._profile is not None and step >= self._last:
            self._profile.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            trace = self._folder / f"steps-{self._first}-{step}.json"
            self._profile.export_chrome_trace(str(trace))
            self._profile = None
