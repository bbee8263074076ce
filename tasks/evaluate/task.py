"""The Prefect task around an evaluation; everything it does is in the pure modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifacts.artifact import Address, Artifact, produce
from tasks.evaluate.config import EvaluateConfig, Machine
from tasks.evaluate.evaluate import evaluate_models
from tasks.evaluate.metrics.contamination import TrainingData
from tasks.progress import Report


@task(name="evaluate", cache_policy=NO_CACHE)
def evaluate(
    address: Address,
    config: EvaluateConfig,
    models: Mapping[str, str | Path],
    sets: Mapping[str, Path],
    curves: Sequence[Path],
    machine: Machine,
    trained_on: Sequence[TrainingData],
    lineage: str,
    report: Report,
) -> Artifact:
    """The evaluation at `address`: `models` on `sets`, made now or found finished; `trained_on`
    is the data of the first of them, `lineage` a picture of what that was made from."""
    return produce(
        address,
        lambda out: evaluate_models(
            *(config, models, sets, curves, out, report),
            machine=machine,
            trained_on=trained_on,
            lineage=lineage,
        ),
    )
