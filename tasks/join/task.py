"""The Prefect task around a join; everything it does is in the pure modules."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifacts.artifact import Address, Artifact, produce
from tasks.join.config import JoinConfig
from tasks.join.join import join_verifications
from tasks.progress import Report


@task(name="join", cache_policy=NO_CACHE)
def join(
    address: Address, config: JoinConfig, verified: Sequence[Artifact], report: Report
) -> Artifact:
    """The verifications as one at `address`, made now or found finished."""
    return produce(address, lambda out: join_verifications(config, verified, out, report))
