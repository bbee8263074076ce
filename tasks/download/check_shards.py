"""Check of shards against their own counts, and the ledger of those that were found whole before.
Not here: whether images decode (the verify stage). 200,000 shards are 50 TB; the sizes and times of
their files, by which the ledger knows them again, are seconds."""

import json
import tarfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from evaclip_model.reading.samples import RECORD_EXTENSION, BrokenShard
from tasks.download.fetch_outcome import Outcome, outcome_of, retry_after_s
from tasks.download.url_tables import PlannedShard


@dataclass(frozen=True)
class FinishedShard:
    """A shard that holds what was planned."""

    planned: PlannedShard
    outcomes: Counter[Outcome]
    """Adds up to the planned rows."""
    tar_bytes: int
    retry_after_s: float
    """Longest wait that a server asked for in a row that may pass later, in seconds; 0: none."""

    @property
    def success_rate(self) -> float:
        return self.outcomes[Outcome.SUCCESS] / self.planned.rows


def check_shard(folder: Path, planned: PlannedShard) -> FinishedShard:
    """Compare a shard's plan, statistics, table and tar; raises `BrokenShard` where a file is
    missing or cannot be read, or two of them disagree."""
    tar_path, table_path, stats_path = shard_files(folder, planned)
    try:
        stats = json.loads(stats_path.read_text())
        table = pq.read_table(table_path, columns=["status", "error_message"])
        with tarfile.open(tar_path, "r:") as tar:
            in_tar = sum(name.endswith(f".{RECORD_EXTENSION}") for name in tar.getnames())
        stated_rows, stated_successes = stats["count"], stats["successes"]
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowInvalid, tarfile.TarError) as error:
        raise BrokenShard(f"shard {planned.name} is unfinished or unreadable: {error}") from error
    messages = table["error_message"].to_pylist()
    rows = zip(table["status"].to_pylist(), messages, strict=True)
    outcomes = Counter(outcome_of(str(status), message) for status, message in rows)
    counted = {
        "rows planned": planned.rows,
        "rows in its statistics": stated_rows,
        "rows in its table": table.num_rows,
    }
    succeeded = {
        "successes in its statistics": stated_successes,
        "successes in its table": outcomes[Outcome.SUCCESS],
        "samples in its tar": in_tar,
    }
    for numbers in (counted, succeeded):
        if len(set(numbers.values())) > 1:
            found = ", ".join(f"{number} {what}" for what, number in numbers.items())
            raise BrokenShard(f"shard {planned.name} contradicts itself: {found}")
    asked_s = max(map(retry_after_s, messages), default=0.0)
    return FinishedShard(planned, outcomes, tar_path.stat().st_size, asked_s)


def remove_shard(folder: Path, planned: PlannedShard) -> None:
    """Remove a shard, its statistics first: without them img2dataset does it again."""
    for path in reversed(shard_files(folder, planned)):
        path.unlink(missing_ok=True)


def shard_files(folder: Path, planned: PlannedShard) -> list[Path]:
    """Its tar, its table of all rows, its statistics (which img2dataset writes last)."""
    return [folder / f"{planned.name}{end}" for end in (".tar", ".parquet", "_stats.json")]


_LINE = TypeAdapter(tuple[FinishedShard, list[tuple[int, int]]])
"""A shard, size and time of change of each of its files."""


class Ledger:
    """The whole shards of one folder, as the file at `path` remembers them."""

    def __init__(self, path: Path, folder: Path) -> None:
        self._path = path
        self._folder = folder
        self._known: dict[PlannedShard, tuple[FinishedShard, list[tuple[int, int]]]] = {}
        for line in path.read_bytes().splitlines() if path.exists() else ():
            with suppress(ValueError):  # a line that a kill cut short is nothing
                entry = _LINE.validate_json(line)
                self._known[entry[0].planned] = entry

    def check_planned(self, planned: PlannedShard) -> FinishedShard:
        """The shard as remembered, or as `check_shard` finds it now."""
        try:
            stats = [path.stat() for path in shard_files(self._folder, planned)]
        except OSError as error:
            raise BrokenShard(f"shard {planned.name} is unfinished: {error}") from error
        stamp = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
        known, before = self._known.get(planned, (None, None))
        if known is None or before != stamp:
            known = check_shard(self._folder, planned)
            self._known[planned] = known, stamp
            with self._path.open("ab") as file:
                file.write(_LINE.dump_json((known, stamp)) + b"\n")
        return known
