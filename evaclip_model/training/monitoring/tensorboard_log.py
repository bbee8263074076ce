"""The figures of `metrics.jsonl` as TensorBoard events.

Covers: writing a line's numbers as scalars of the same names.
Not here: the figures (step_metrics.py). Needs the package tensorboard, which nothing else does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaclip_model.errors import InputError

TENSORBOARD_FOLDER = "tensorboard"
_AXES = ("step", "time")


class TensorBoardLog:
    """Events in a folder; a resumed run goes on in it."""

    def __init__(self, folder: Path) -> None:
        """Raises: InputError: the package is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError(
                "tensorboard = true needs the package tensorboard: pip install "
                "'evaclip[tensorboard]', or set it to false"
            ) from None
        self._open: Any = SummaryWriter
        self._folder = folder
        self._writer: Any = None

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a line of metrics, as JSON has it."""
        if self._writer is None:
            self._writer = self._open(str(self._folder), purge_step=row["step"])
        for name, value in row.items():
            if name not in _AXES:
                self._writer.add_scalar(name, value, row["step"], walltime=row["time"])

    def cut_back(self) -> None:
        """The next step written voids what is there of it and of later ones."""
        self.close()

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
