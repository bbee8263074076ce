"""img2dataset's downloader with our fetching and our order of samples.

Covers: the subclass that img2dataset pickles to its processes, and the writer it writes with.
Not here: the fetching itself (fetch.py), the call (worker.py). Imports img2dataset, which takes
seconds and 0.8 GB: only the worker may import this.
"""

from __future__ import annotations

import heapq
import importlib
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from img2dataset.downloader import Downloader
from img2dataset.writer import WebDatasetSampleWriter

from tasks.download.config import DownloadConfig
from tasks.download.counters import OutcomeCounter
from tasks.download.fetch import Fetcher
from tasks.download.fetch_outcome import outcome_of


class HardenedDownloader(Downloader):
    """Fetches with our fetcher, counts every URL, writes shards that can be repeated."""

    def __init__(self, *, config: DownloadConfig, counters: Path, **options: Any) -> None:
        super().__init__(**{**options, "sample_writer_class": OrderedWriter})
        self._config = config
        self._counters = counters

    def __call__(self, row: tuple[int, str]) -> tuple[bool, tuple[int, str]]:
        shard, rows_file = row
        fetcher = Fetcher(self._config)
        digests = _column(rows_file, self._config.hash_column)
        with OutcomeCounter(self._counters, shard) as counter:
            # img2dataset looks this name up in its module for every URL; there is no other way
            # in. importlib, because a package's attribute of a module's name may be a function.
            module: Any = importlib.import_module("img2dataset.downloader")
            module.download_image_with_retry = partial(_fetch, fetcher, digests, counter)
            done: tuple[bool, tuple[int, str]] = super().__call__(row)
        return done


def _column(rows_file: str, name: str) -> Sequence[str | None]:
    """A column of a shard's rows as img2dataset laid them out; nothing for no name."""
    if not name:
        return ()
    with open(rows_file, "rb") as file:
        values: list[str | None] = pa.ipc.open_file(file).read_all()[name].to_pylist()
        return values


def _fetch(
    fetcher: Fetcher,
    digests: Sequence[str | None],
    counter: OutcomeCounter,
    row: tuple[int, str],
    **_: object,
) -> tuple[int, io.BytesIO | None, str | None]:
    """What img2dataset calls for a row (its place, URL), with options that the fetcher knows."""
    place, url = row
    body, message = fetcher.get(url, digests[place] if digests else None)
    counter.add(outcome_of("success" if message is None else "failed", message), len(body or b""))
    return place, None if body is None else io.BytesIO(body), message


class OrderedWriter(WebDatasetSampleWriter):
    """Writes a shard in the order of its rows, not of the network, and without clock times.

    The same answers then give the same bytes, whatever was interrupted or slow; training that
    reads them repeats exactly. Samples that overtook a slow one wait here in memory.
    """

    def __init__(
        self,
        shard_id: int,
        output_folder: str,
        save_caption: bool,
        oom_shard_count: int,
        schema: Any,
        encode_format: str,
    ) -> None:
        super().__init__(
            shard_id, output_folder, save_caption, oom_shard_count, schema, encode_format
        )
        self.tarwriter.mtime = 0
        self._next: int | None = None
        self._waiting: list[tuple[int, tuple[Any, ...]]] = []

    def write(self, img_str: bytes | None, key: str, caption: str | None, meta: Any) -> None:
        if self._next is None:
            self._next = self.shard_id * 10 ** (len(key) - self.oom_shard_count)
        heapq.heappush(self._waiting, (int(key), (img_str, key, caption, meta)))
        while self._waiting and self._waiting[0][0] == self._next:
            super().write(*heapq.heappop(self._waiting)[1])
            self._next += 1

    def close(self) -> None:
        while self._waiting:
            super().write(*heapq.heappop(self._waiting)[1])
        super().close()
