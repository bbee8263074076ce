"""Train one stage in processes of its own, and follow it through its folder.

Covers: the job file, running and restarting the ranks, progress, what the artifact holds.
Not here: the training itself (evaclip_model/training/worker.py); what starts ranks (launch.py).
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from evaclip_model.errors import InputError
from evaclip_model.training.config import (
    ERROR_FILE,
    JOB_FILE,
    METRICS_FILE,
    MODEL_FOLDER,
    RESULT_FILE,
    RESUMABLE_FILE,
    TrainConfig,
    TrainJob,
)
from tasks.artifact import Made, write_atomically
from tasks.child import run_supervised
from tasks.progress import Report
from tasks.train.launch import (
    command,
    count_gpus,
    default_ranks,
    default_read_workers,
    environment,
)

LOG_FILE = "train.log"
GRACE_S = 20.0
"""Time for the ranks to save a checkpoint between SIGTERM and SIGKILL."""
MAX_IDLE_RESTARTS = 2
"""Restarts in a row without a single new step before a crash is given up on."""
_RATE_STEPS = 20
_LOG_TAIL = 2000


class TrainingCrashed(RuntimeError):
    """The ranks died again and again without a reason of the user's making; the log's end is in."""


def train_model(
    config: TrainConfig, start_from: Path, shards: Path, out: Path, ranks: int, report: Report
) -> Made:
    """Train to the end, from the newest checkpoint in `out` if a killed run left one.

    Args:
        start_from: folder of the model to start from.
        shards: `shards.json` of the verified shards.
        out: the artifact's folder; the trainer's run folder.
        ranks: processes; each gets an equal part of this machine's cores. 0: as the machine has.

    Raises:
        InputError: the trainer found a mistake of the user's, or the loss diverged.
        TrainingCrashed: the ranks crash without making progress.
    """
    if not (out / RESULT_FILE).is_file():
        _run(config, start_from, shards, out, ranks, report)
    result = json.loads((out / RESULT_FILE).read_text())
    report(config.steps, config.steps, f"loss {result['final_loss']:.3f}")
    kept = [JOB_FILE, METRICS_FILE, RESULT_FILE]
    files = (*(out / name for name in kept), *sorted((out / MODEL_FOLDER).iterdir()))
    return Made(_counts(result), files)


def _run(
    config: TrainConfig, start_from: Path, shards: Path, out: Path, ranks: int, report: Report
) -> None:
    cores = len(os.sched_getaffinity(0))
    gpus = count_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
    ranks = ranks or default_ranks(cores, gpus)
    job = TrainJob(
        train=config,
        start_from=start_from.resolve(),
        shards=shards.resolve(),
        run_dir=out.resolve(),
        threads=max(1, cores // ranks),
        read_workers=default_read_workers(cores, ranks, gpus),
    )
    write_atomically(out / JOB_FILE, job.model_dump_json(indent=1) + "\n")
    env = environment(os.environ, ranks, cores, use_gpus=gpus > 0)
    follower = _Follower(config, out / METRICS_FILE, report)
    idle = 0
    while idle <= MAX_IDLE_RESTARTS:
        for name in (ERROR_FILE, RESUMABLE_FILE):
            (out / name).unlink(missing_ok=True)
        before = follower.step
        status = run_supervised(
            command(out.resolve() / JOB_FILE, ranks),
            log=out / LOG_FILE,
            grace_s=GRACE_S,
            env=env,
            poll=follower.look,
        )
        follower.look()
        if (out / ERROR_FILE).is_file():
            raise InputError(f"training stage '{config.name}': {_text(out / ERROR_FILE)}")
        if status == 0:
            return
        idle = 0 if follower.step > before else idle + 1
    raise TrainingCrashed(
        f"training stage '{config.name}' ended {idle} times with status {status} and no new step; "
        f"the end of {out / LOG_FILE}:\n{_text(out / LOG_FILE)[-_LOG_TAIL:]}"
    )


class _Follower:
    """Reads the metrics file as it grows and says how far training is."""

    def __init__(self, config: TrainConfig, metrics: Path, report: Report) -> None:
        self._config = config
        self._metrics = metrics
        self._report = report
        self._recent: list[dict[str, Any]] = []
        self.step = 0

    def look(self) -> None:
        rows = _last_rows(self._metrics, _RATE_STEPS)
        if not rows or rows == self._recent:
            return
        self._recent = rows
        self.step = rows[-1]["step"]
        self._report(self.step, self._config.steps, _detail(rows, self._config.steps))


def _detail(rows: list[dict[str, Any]], steps: int) -> str:
    """Loss, speed, logit scale and time left, from the newest rows."""
    newest = rows[-1]
    seconds = sum(row["step_s"] for row in rows) / len(rows)
    speed = sum(row["images_per_second"] for row in rows) / len(rows)
    left = time.strftime("%H:%M:%S", time.gmtime((steps - newest["step"]) * seconds))
    return (
        f"loss {newest['loss']:.3f}  {speed:,.0f} images/s  "
        f"logit scale {newest['logit_scale']:.1f}  {left} left"
    )


def _last_rows(metrics: Path, count: int) -> list[dict[str, Any]]:
    """The newest whole lines, oldest first."""
    if not metrics.is_file():
        return []
    with metrics.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1000 * count))
        lines = file.read().split(b"\n")
    whole = lines[1 if size > 1000 * count else 0 : -1]
    return [json.loads(line) for line in whole[-count:]]


def _counts(result: dict[str, Any]) -> dict[str, int | float]:
    counts = {name: result[name] for name in ("steps", "samples_seen", "final_loss", "seconds")}
    drawn = {f"{name}.samples": count for name, count in result["source_samples"].items()}
    bad = {f"bad.{reason}": count for reason, count in result["bad_samples"].items()}
    return {**counts, **drawn, **bad}


def _text(path: Path) -> str:
    return path.read_text(errors="replace").strip()
