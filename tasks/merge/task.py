"""The Prefect tasks around a merge; everything they do is in the pure modules."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.futures import as_completed

from evaclip_model.errors import InputError
from tasks.artifacts.artifact import Address, Artifact, produce
from tasks.merge.config import MergeConfig
from tasks.merge.database import share_of_memory
from tasks.merge.merge import merge_sources, one_after_another
from tasks.merge.survey_files import Files
from tasks.merge.units import Chunk, run_chunk
from tasks.progress import Report


@task(name="merge", cache_policy=NO_CACHE)
def merge(
    address: Address,
    config: MergeConfig,
    files: Files,
    workers: int,
    given: Sequence[Artifact],
    report: Report,
) -> Artifact:
    """The merge of `files` (source name -> its files) at `address`, made now or found, without what
    the merges in `given` have selected.

    With several `workers` every phase is that many tasks, on whatever the flow's task runner has,
    which must share the artifact's folder; each gets its part of the memory limit and the cores.
    """
    before = [artifact.folder for artifact in given]
    if workers == 1:
        return produce(address, lambda out: merge_sources(config, files, out, report, given=before))
    threads = max(1, (os.cpu_count() or 1) // workers)
    memory_limit = share_of_memory(config.memory_limit, workers)
    return produce(
        address,
        lambda out: merge_sources(
            *(config, files, out, report),
            threads=threads,
            run=one_after_another if config.engine == "spark" else _as_tasks,
            chunks=workers,
            memory_limit=memory_limit,
            given=before,
        ),
    )


def _worth_another_try(task: Any, run: Any, state: Any) -> bool:
    return not isinstance(state.result(raise_on_failure=False), InputError)


@task(
    name="merge-chunk",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=5,
    retry_condition_fn=_worth_another_try,
)
def merge_chunk(chunk: Chunk) -> list[int]:
    """Some units of one phase; what is finished of them is not done again."""
    return list(run_chunk(chunk))


def _as_tasks(chunks: Sequence[Chunk]) -> Iterator[int]:
    """The `Runner` of the flow's task runner."""
    for future in as_completed([merge_chunk.submit(chunk) for chunk in chunks]):
        yield from future.result()
