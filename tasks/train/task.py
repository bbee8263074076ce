"""The Prefect task around a training stage; everything it does is in the pure modules."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from evaclip_model.reading.samples import SHARDS
from evaclip_model.training.config import MODEL_FOLDER, TrainConfig
from tasks.artifacts.artifact import Address, Artifact, produce
from tasks.progress import Report
from tasks.train.config import Launch
from tasks.train.train import Inputs, train_model


@task(name="train", cache_policy=NO_CACHE)
def train_stage(
    address: Address,
    config: TrainConfig,
    start_from: Artifact,
    verified: Artifact,
    launch: Launch,
    report: Report,
) -> Artifact:
    """Train one stage from the model in `start_from`, or return what was trained before."""
    inputs = Inputs(start_from.folder / MODEL_FOLDER, verified.folder / SHARDS)
    return produce(address, lambda out: train_model(config, inputs, out, launch, report))
