"""A probe of our own network: images that came before are asked for again.

Covers: choosing such images, asking for them, the sentence when none of their hosts answers.
Not here: when to ask (download.py).

Rows that a later pass tries have failed before, most of them on hosts that are gone for good, so
that their failures cannot tell a dead network from dead hosts. Hosts that gave images an hour ago
can.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.download.check_shards import FinishedShard, shard_files
from tasks.download.config import DownloadConfig
from tasks.download.fetch import Fetcher
from tasks.download.fetch_outcome import NETWORK, Outcome, outcome_of
from tasks.download.url_tables import URL_COLUMN

HOSTS = 16
"""Hosts that have to be silent before the network is held to be down."""
AT_ONCE = 4
"""Hosts asked at the same time; one answer is enough, so nearly always no more are asked."""
LONGEST_S = 5.0
"""Time for one host."""


def silent_hosts(finished: Sequence[FinishedShard], shards: Path, config: DownloadConfig) -> int:
    """How many hosts that gave images into these shards do not answer now; 0 if one of them does.

    Any answer counts, a refusal too. 0 as well if no shard holds an image.
    """
    limits = {
        "timeout_s": min(config.timeout_s, LONGEST_S),
        "deadline_s": min(config.deadline_s, LONGEST_S),
        "retries": 0,
        "respect_robots": False,  # a second request; the image was allowed when it was fetched
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
