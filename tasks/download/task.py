"""The Prefect task around a download; everything it does is in the pure modules."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifacts.artifact import Address, Artifact, produce
from tasks.download.config import DownloadConfig
from tasks.download.download import Crew, download_images
from tasks.progress import Report


@task(name="download", cache_policy=NO_CACHE)
def download(
    address: Address,
    config: DownloadConfig,
    merged: Artifact,
    crew: Crew,
    report: Report,
) -> Artifact:
    """The shards of `merged` at `address`, downloaded now or found finished."""
    return produce(
        address,
        lambda out: download_images(config, merged.folder, out, crew, report),
    )
