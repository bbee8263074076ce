"""The Prefect task around a dataset version; everything it does is in the pure modules."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifacts.artifact import Address, Artifact, produce
from tasks.dataset.config import DatasetConfig
from tasks.dataset.dataset import OutsideFiles, Takedowns, make_dataset
from tasks.progress import Report


@task(name="dataset", cache_policy=NO_CACHE)
def dataset(
    address: Address,
    config: DatasetConfig,
    ancestors: Sequence[Artifact],
    outside: OutsideFiles,
    takedowns: Takedowns,
    report: Report,
) -> Artifact:
    """The version of the last of `ancestors` at `address`, made now or found finished."""
    return produce(
        address, lambda out: make_dataset(config, ancestors, outside, takedowns, out, report)
    )
