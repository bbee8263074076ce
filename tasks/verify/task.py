"""The Prefect task around a verification; everything it does is in the pure modules."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifact import Artifact, produce
from tasks.progress import Report
from tasks.verify.config import VerifyConfig, address
from tasks.verify.verify import verify_shards


@task(name="verify", cache_policy=NO_CACHE)
def verify(
    root: Path, config: VerifyConfig, downloaded: Artifact, threads: int, report: Report
) -> Artifact:
    """Verify the shards of `downloaded`, or return the manifest made of them before."""
    return produce(
        address(root, config, downloaded.digest),
        lambda out: verify_shards(config, downloaded.folder, out, threads, report),
    )
