"""One run whose step reports 200,000 shards and writes the metrics of 62,500 steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from evaclip_model.config import Config
from evaclip_model.training.config import JOB_FILE, METRICS_FILE
from flows.commands.run import temporary_server
from flows.config.profile import Profile
from flows.graph.step import Record, Step
from tasks.artifacts.artifact import Made, Stage
from tasks.progress import Report

SHARDS, STEPS, BATCH, FIGURES = 200_000, 62_500, 32_768, 37
SPIKE, ROLLED_BACK = 31_337, 40_001
VALIDATED_EVERY = 1_000
WAITED = 2_000
"""Reports of a stage that is done but for what it waits for."""


def line(step: int) -> dict[str, float]:
    figures = {f"f{n}": step + n + 1.0 for n in range(FIGURES)}
    marks = {"spike": int(step == SPIKE), "rollbacks": int(step >= ROLLED_BACK)}
    validated = {"validation_loss": 1.0} if step % VALIDATED_EVERY == 0 else {}
    return {"step": step, "time": 1.7e9 + step, **figures, **marks, **validated}


def train(profile: Profile, out: Path, report: Report) -> Made:
    settings = {"samples_seen": STEPS * BATCH - 1, "global_batch": BATCH}
    (out / JOB_FILE).write_text(json.dumps({"train": settings}))
    with (out / METRICS_FILE).open("w") as metrics:
        metrics.writelines(json.dumps(line(step)) + "\n" for step in range(1, STEPS + 1))
    for shard in range(SHARDS):
        report(shard + 1, SHARDS, f"{shard} shards")
    for _ in range(WAITED):
        report(SHARDS, SHARDS, "all there, waiting")
    return Made({"steps": STEPS}, (out / METRICS_FILE,))


def run_step(root: Path) -> None:
    from prefect import flow

    from flows.graph import runner

    runner.PREFECT_EVERY_S = 0.1

    @flow
    def run_once() -> None:
        profile = Profile(_env_file=None, root=root)
        record = Record(metrics=METRICS_FILE)
        step = Step(profile.root.resolve(), Stage("train", 1), Config(), {}, train, record=record)
        with runner.track_run(profile, "rows", "rows", "digest", {}) as run:
            runner.Session(profile, run).make_step(step)

    run_once()


if __name__ == "__main__":
    with temporary_server(Path(sys.argv[1])):
        run_step(Path(sys.argv[1]))
