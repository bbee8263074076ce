"""The Prefect task around a verification; everything it does is in the pure modules."""

from __future__ import annotations

import os

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifact import Address, Artifact, produce
from tasks.progress import Report
from tasks.verify.config import VerifyConfig
from tasks.verify.verify import verify_shards


@task(name="verify", cache_policy=NO_CACHE)
def verify(
    address: Address, config: VerifyConfig, downloaded: Artifact, report: Report
) -> Artifact:
    """The manifest of the shards of `downloaded` at `address`, made now or found finished."""
    threads = os.cpu_count() or 1
    return produce(
        address, lambda out: verify_shards(config, downloaded.folder, out, threads, report)
    )
