"""The chunks of a merge as Prefect tasks, on whatever a flow's task runner has."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prefect import task
from prefect.futures import as_completed

from evaclip_model.errors import InputError
from tasks.artifacts.artifact import Made
from tasks.merge.config import MergeConfig
from tasks.merge.database import share_of_memory
from tasks.merge.merge import merge_sources
from tasks.merge.merge_plan import Files
from tasks.merge.units import Chunk, run_chunk
from tasks.progress import Report


def merge_in_chunks(
    config: MergeConfig,
    files: Files,
    out: Path,
    report: Report,
    workers: int,
    given: Sequence[Path],
) -> Made:
    """Merge `files` (source name -> its files) into `out`, without what the merges in `given` have
    selected.

    With several `workers` every phase is that many tasks, on whatever the flow's task runner has,
    which must share the artifact's folder; each gets its part of the memory limit and the cores.
    """
    if workers == 1:
        return merge_sources(config, files, out, report, given=given)
    return merge_sources(
        *(config, files, out, report),
        threads=max(1, (os.cpu_count() or 1) // workers),
        run=_run_as_tasks,  # Spark has a runner of its own
        chunks=workers,
        memory_limit=share_of_memory(config.memory_limit, workers),
        given=given,
    )


def _is_worth_another_try(task: Any, run: Any, state: Any) -> bool:
    return not isinstance(state.result(raise_on_failure=False), InputError)


@task(
    name="merge-chunk",
    persist_result=False,
    retries=2,
    retry_delay_seconds=5,
    retry_condition_fn=_is_worth_another_try,
)
def merge_chunk(chunk: Chunk) -> list[int]:
    """Some units of one phase; what is finished of them is not done again."""
    return list(run_chunk(chunk))


def _run_as_tasks(chunks: Sequence[Chunk]) -> Iterator[int]:
    for future in as_completed([merge_chunk.submit(chunk) for chunk in chunks]):
        yield from future.result()
