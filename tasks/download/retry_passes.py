"""The rows that another pass tries: those whose failure may pass.

Covers: collecting them from the tables of a finished pass, counting over all passes.
Not here: downloading; which failures may pass (fetch_outcome.py).
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.download.check_shards import FinishedShard, shard_files
from tasks.download.fetch_outcome import RETRYABLE, Outcome, outcome_of

SHARDS_PER_FILE = 20
"""Shards' worth of rows in one file of rows; so many are in memory at once."""


def sum_of(finished: Sequence[FinishedShard]) -> Counter[Outcome]:
    """How the rows of these shards ended."""
    return sum((shard.outcomes for shard in finished), Counter[Outcome]())


def rows_to_retry(finished: Sequence[FinishedShard]) -> int:
    """How many rows of these shards another pass would try."""
    outcomes = sum_of(finished)
    return sum(outcomes[outcome] for outcome in RETRYABLE)


def wait_before(finished: Sequence[FinishedShard], longest_s: float) -> float:
    """Seconds to pause before the next pass: what servers asked for, at most `longest_s`."""
    return min(longest_s, max((shard.retry_after_s for shard in finished), default=0.0))


def write_rows_to_retry(
    finished: Sequence[FinishedShard],
    shards: Path,
    columns: Sequence[str],
    rows: Path,
    samples_per_shard: int,
) -> None:
    """Write `rows/<source>/part-*.parquet` with the rows to try again, in their order.

    The folder appears whole, by renaming. `columns` are those that the rows came with.
    """
    beside = rows.with_name(f".{rows.name}")
    shutil.rmtree(beside, ignore_errors=True)
    ordered = sorted(finished, key=lambda shard: (shard.planned.source, shard.planned.number))
    for source, of_source in groupby(ordered, key=lambda shard: shard.planned.source):
        (beside / source).mkdir(parents=True)
        tables = (_failed_rows(shards, shard, columns) for shard in of_source)
        _write_parts(tables, beside / source, SHARDS_PER_FILE * samples_per_shard)
    beside.rename(rows)


def total_outcomes(passes: Sequence[Sequence[FinishedShard]]) -> dict[str, Counter[Outcome]]:
    """How every row ended, by source: a row that was tried again ended as in its last pass."""
    total: dict[str, Counter[Outcome]] = {}
    for number, finished in enumerate(passes):
        tried_again = number + 1 < len(passes)
        for shard in finished:
            outcomes = total.setdefault(shard.planned.source, Counter())
            for outcome, rows in shard.outcomes.items():
                if not (tried_again and outcome in RETRYABLE):
                    outcomes[outcome] += rows
    return total


def _failed_rows(shards: Path, shard: FinishedShard, columns: Sequence[str]) -> pa.Table:
    """The rows of one shard's table that may succeed later."""
    table = pq.read_table(shard_files(shards, shard.planned)[1])
    ended = zip(table["status"].to_pylist(), table["error_message"].to_pylist(), strict=True)
    may_pass = [outcome_of(str(status), message) in RETRYABLE for status, message in ended]
    return table.filter(pa.array(may_pass, pa.bool_())).select(list(columns))


def _write_parts(tables: Iterator[pa.Table], folder: Path, rows_per_file: int) -> None:
    """Write the tables one after another, in files of exactly `rows_per_file` rows but the last."""
    waiting = next(tables)
    files = 0
    for table in tables:
        waiting = pa.concat_tables([waiting, table])
        while waiting.num_rows >= rows_per_file:
            pq.write_table(waiting.slice(0, rows_per_file), folder / f"part-{files:05d}.parquet")
            waiting, files = waiting.slice(rows_per_file), files + 1
    if waiting.num_rows:
        pq.write_table(waiting, folder / f"part-{files:05d}.parquet")
