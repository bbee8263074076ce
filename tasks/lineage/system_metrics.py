"""The machine's use while a stage works, as one more metrics file.

Covers: CPU, memory, disk, network and NVIDIA GPUs, sampled by MLflow's monitors.
Not here: sending it (series.py).
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)


class SystemSampler(threading.Thread):
    """Writes the machine's use (CPU, memory, disk, network, GPU) as one more series.

    Through the journal instead of MLflow's own monitor thread, which loses what it cannot send.
    """

    def __init__(self, file: Path, every_s: float) -> None:
        super().__init__(name="system-metrics", daemon=True)
        self._file = file
        self._every_s = every_s
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()
        self.join(self._every_s)

    def run(self) -> None:
        try:
            monitors = _monitors()
            step = _lines_in(self._file)
            while not self._stopped.wait(self._every_s):
                with self._file.open("a") as file:
                    file.write(json.dumps({"step": step, "time": time.time(), **_sample(monitors)}))
                    file.write("\n")
                step += 1
        except Exception as error:  # figures about the machine are never worth a run
            _log.warning("system metrics stopped: %s", error)


def _lines_in(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with suppress(Exception):  # no NVIDIA GPU, or no library to ask it
        monitors.append(GPUMonitor())
    _sample(monitors)  # the first CPU figure covers no time, so it means nothing
    return monitors


def _sample(monitors: Sequence[Any]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for monitor in monitors:
        monitor.collect_metrics()
        figures |= {f"system/{name}": v for name, v in monitor.aggregate_metrics().items()}
        monitor.clear_metrics()
    return figures
