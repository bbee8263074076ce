"""Later passes: the rows that they try (those whose failure may pass), the counts over all passes,
and the question whether our own network is there.

Rows that a later pass tries have failed before, most of them on hosts that are gone for good. They
cannot tell a dead network from dead hosts; hosts that gave images an hour ago can.
"""

import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.download.check_shards import FinishedShard, shard_files
from tasks.download.config import DownloadConfig
from tasks.download.fetch import Fetcher
from tasks.download.fetch_outcome import NETWORK, RETRYABLE, Outcome, outcome_of
from tasks.download.url_tables import URL_COLUMN
from tasks.tables.parquet_tables import cut_tables

SHARDS_PER_FILE = 20
"""Shards' worth of rows in one file of rows; so many are in memory at once."""
HOSTS = 16
"""Hosts that have to be silent before the network is held to be down."""
AT_ONCE = 4
"""Hosts asked at the same time; one answer is enough, so nearly always no more are asked."""
LONGEST_S = 5.0
"""Time for one host."""


def sum_of(finished: Sequence[FinishedShard]) -> Counter[Outcome]:
    return sum((shard.outcomes for shard in finished), Counter[Outcome]())


def rows_to_retry(finished: Sequence[FinishedShard]) -> int:
    return sum(shard.outcomes[outcome] for shard in finished for outcome in RETRYABLE)


def write_rows_to_retry(
    finished: Sequence[FinishedShard],
    shards: Path,
    columns: Sequence[str],
    rows: Path,
    samples_per_shard: int,
) -> None:
    """Write `rows/<source>/part-*.parquet` with the rows to try again, in their order; the folder
    appears whole, by renaming."""
    beside = rows.with_name(f".{rows.name}")
    shutil.rmtree(beside, ignore_errors=True)
    ordered = sorted(finished, key=lambda shard: (shard.planned.source, shard.planned.number))
    for source, of_source in groupby(ordered, key=lambda shard: shard.planned.source):
        (beside / source).mkdir(parents=True)
        tables = (_failed_rows(shards, shard, columns) for shard in of_source)
        for number, table in enumerate(cut_tables(tables, SHARDS_PER_FILE * samples_per_shard)):
            pq.write_table(table, beside / source / f"part-{number:05d}.parquet")
    beside.rename(rows)


def total_outcomes(passes: Sequence[Sequence[FinishedShard]]) -> dict[str, Counter[Outcome]]:
    """Return how every row ended, by source: one that was tried again as in its last pass."""
    total = defaultdict[str, Counter[Outcome]](Counter)
    for number, finished in enumerate(passes, 1):
        for shard in finished:
            for outcome, rows in shard.outcomes.items():
                if number == len(passes) or outcome not in RETRYABLE:
                    total[shard.planned.source][outcome] += rows
    return total


def _failed_rows(shards: Path, shard: FinishedShard, columns: Sequence[str]) -> pa.Table:
    table = pq.read_table(shard_files(shards, shard.planned)[1])
    ended = zip(table["status"].to_pylist(), table["error_message"].to_pylist(), strict=True)
    may_pass = [outcome_of(str(status), message) in RETRYABLE for status, message in ended]
    return table.filter(pa.array(may_pass, pa.bool_())).select(list(columns))


def silent_hosts(finished: Sequence[FinishedShard], shards: Path, config: DownloadConfig) -> int:
    """Return how many hosts that gave images into these shards do not answer now; 0 if one of them
    does (a refusal is an answer), or if no shard holds an image."""
    # no rules: they would be a second request, and the image was allowed when it was fetched
    unruled = {"respect_robots": False, "respect_ai_txt": False}
    limits = {
        "timeout_s": min(config.timeout_s, LONGEST_S),
        "deadline_s": min(config.deadline_s, LONGEST_S),
        "retries": 0,
        "politeness": config.politeness.model_copy(update=unruled),
    }
    fetcher = Fetcher(config.model_copy(update=limits))

    def answers(url: str) -> bool:
        body, message = fetcher.fetch_image(url)
        return body is not None or outcome_of("failed_to_download", message) not in NETWORK

    urls = list(_pick_urls(finished, shards))
    with ThreadPoolExecutor(AT_ONCE, "witness") as pool:
        for begin in range(0, len(urls), AT_ONCE):
            if any(pool.map(answers, urls[begin : begin + AT_ONCE])):
                return 0
    return len(urls)


def _pick_urls(finished: Sequence[FinishedShard], shards: Path) -> Iterator[str]:
    """URLs that gave images, of different hosts, the newest shards first."""
    hosts: set[str] = set()
    for shard in reversed(finished):
        table = pq.read_table(
            shard_files(shards, shard.planned)[1],
            columns=[URL_COLUMN],
            filters=pc.field("status") == "success",
        )
        for url in table[URL_COLUMN].to_pylist():
            host = urlsplit(url).netloc
            if host not in hosts:
                hosts.add(host)
                yield url
            if len(hosts) == HOSTS:
                return
