"""The merge as a Prefect task.

Covers: naming, the address, publishing.
Not here: how rows are merged; see merge.py.
"""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifact import Artifact, produce
from tasks.merge.config import MergeConfig
from tasks.merge.inputs import address, find_files
from tasks.merge.merge import merge_sources
from tasks.progress import Report, silent


@task(name="merge", cache_policy=NO_CACHE)
def merge(
    root: Path,
    config: MergeConfig,
    demo: Artifact | None = None,
    *,
    threads: int | None = None,
    report: Report = silent,
) -> Artifact:
    """Merge the sources of `config`; files that begin with `demo:` are looked up in `demo`."""
    return produce(
        address(root, config, demo.digest if demo else None),
        lambda out: merge_sources(
            config, find_files(config, demo.folder if demo else None), out, report, threads=threads
        ),
    )
