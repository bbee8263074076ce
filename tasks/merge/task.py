"""The Prefect task around a merge; everything it does is in the pure modules."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifact import Address, Artifact, produce
from tasks.merge.config import MergeConfig
from tasks.merge.merge import Files, merge_sources
from tasks.progress import Report


@task(name="merge", cache_policy=NO_CACHE)
def merge(address: Address, config: MergeConfig, files: Files, report: Report) -> Artifact:
    """The merge of `files` (source name -> parquet files) at `address`, made now or found."""
    return produce(address, lambda out: merge_sources(config, files, out, report))
