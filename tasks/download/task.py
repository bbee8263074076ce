"""The Prefect task around a download; everything it does is in the pure modules."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifact import Artifact, produce
from tasks.download.config import DownloadConfig, address
from tasks.download.download import download_images
from tasks.progress import Report


@task(name="download", cache_policy=NO_CACHE)
def download(
    root: Path,
    config: DownloadConfig,
    merged: Artifact,
    processes: int,
    threads: int,
    report: Report,
) -> Artifact:
    """Download the rows of `merged`, or return the shards made from them before."""
    return produce(
        address(root, config, merged.digest),
        lambda out: download_images(config, merged.folder, out, processes, threads, report),
    )
