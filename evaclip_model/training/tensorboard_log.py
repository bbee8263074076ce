"""The figures of `metrics.jsonl` as TensorBoard events.

Covers: writing a line's numbers as scalars of the same names.
Not here: the figures (metrics.py). Needs the package tensorboard, which nothing else does.
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

    def __init__(self, folder: Path, first_step: int) -> None:
        """Args:
            first_step: first step that will be written; what is there of later ones is void.

        Raises:
            InputError: the package is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError(
                "tensorboard = true needs the package tensorboard: pip install "
                "'evaclip[tensorboard]', or set it to false"
            ) from None
        self._writer = SummaryWriter(str(folder), purge_step=first_step)  # type: ignore[no-untyped-call]

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a line of metrics, as JSON has it."""
        for name, value in row.items():
            if name not in _AXES:
                self._writer.add_scalar(  # type: ignore[no-untyped-call]
                    name, value, row["step"], walltime=row["time"]
                )

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()  # type: ignore[no-untyped-call]
