"""The Prefect task around a verification; everything it does is in the pure modules."""

from __future__ import annotations

import os

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifacts.artifact import Address, Artifact, produce
from tasks.progress import Report
from tasks.verify.config import VerifyConfig
from tasks.verify.verify import verify_shards


@task(name="verify", cache_policy=NO_CACHE)
def verify(
    address: Address, config: VerifyConfig, downloaded: Artifact, report: Report
) -> Artifact:
    """Verdicts on the shards of `downloaded` and their index, made now or found finished."""
    processes = len(os.sched_getaffinity(0))
    return produce(
        address, lambda out: verify_shards(config, downloaded.folder, out, processes, report)
    )
