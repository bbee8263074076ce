"""Later passes: the rows that they try (those whose failure may pass), the counts over all passes,
and the question whether our own network is there.

Rows that a later pass tries have failed before, most of them on hosts that are gone for good, so
that their failures cannot tell a dead network from dead hosts. Hosts that gave images an hour ago
can. Not here: when to ask them (download.py).
"""

import shutil
from collections import Counter
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

SHARDS_PER_FILE = 20
"""Shards' worth of rows in one file of rows; so many are in memory at once."""
HOSTS = 16
"""Hosts that have to be silent before the network is held to be down."""
AT_ONCE = 4
"""Hosts asked at the same time; one answer is enough, so nearly always no more are asked."""
LONGEST_S = 5.0
"""Time for one host."""


def sum_of(finished: Sequence[FinishedShard]) -> Counter[Outcome]:
    """Return how the rows of these shards ended."""
    return sum((shard.outcomes for shard in finished), Counter[Outcome]())


def rows_to_retry(finished: Sequence[FinishedShard]) -> int:
    """Return how many rows of these shards another pass would try."""
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
    """Return how every row ended, by source: a row that was tried again ended as in its last
    pass."""
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


def silent_hosts(finished: Sequence[FinishedShard], shards: Path, config: DownloadConfig) -> int:
    """Return how many hosts that gave images into these shards do not answer now; 0 if one of them
    does.

    Any answer counts, a refusal too. 0 as well if no shard holds an image.
    """
    limits = {
        "timeout_s": min(config.timeout_s, LONGEST_S),
        "deadline_s": min(config.deadline_s, LONGEST_S),
        "retries": 0,
        # a second request; the image was allowed when it was fetched
        "politeness": config.politeness.model_copy(
            update={"respect_robots": False, "respect_ai_txt": False}
        ),
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


def network_gone(counts: Counter[Outcome], silent: int) -> str:
    """The sentence for a later pass whose URLs, and hosts that answered before, are all silent."""
    failed = sum(counts[outcome] for outcome in NETWORK)
    return (
        f"the network or its name service is down: {failed:,} of the last {counts.total():,} URLs "
        f"failed without an answer, and {silent} hosts that gave images before do not answer "
        "either: mend it and run the same command again; what was downloaded is kept"
    )


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
