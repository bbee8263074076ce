"""The Prefect task of the stage; all work is in initialise.py."""

from __future__ import annotations

from functools import partial

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifacts.artifact import Address, Artifact, produce
from tasks.initialise.config import InitialiseConfig
from tasks.initialise.initialise import initialise_model
from tasks.progress import Report


@task(name="initialise", cache_policy=NO_CACHE)
def initialise(address: Address, config: InitialiseConfig, report: Report) -> Artifact:
    """The model that training starts from, or the one made of the same config before."""
    return produce(address, partial(initialise_model, config, report=report))
