"""The rows of every shard, decided before anything is downloaded: files of rows whose columns
img2dataset can keep, shards numbered as it will, and a fingerprint of all that a half-finished
folder must agree with. Then finished shards: the check against their own counts, the ledger of
those that were found whole before, the rows that a later pass tries (those whose failure may pass),
the counts over all passes, and the question whether our own network is there.
Not here: whether images decode (tasks/verify).

200,000 shards are 50 TB; the sizes and times of their files, by which the ledger knows them again,
are seconds. Rows that a later pass tries have failed before, most of them on hosts that are gone
for good. They cannot tell a dead network from dead hosts; hosts that gave images an hour ago can.
"""

import hashlib
import json
import math
import shutil
import tarfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from evaclip_model.errors import InputError
from evaclip_model.reading.samples import RECORD_EXTENSION, BrokenShard
from tasks.artifacts.root_store import Outbox
from tasks.download.config import DownloadConfig
from tasks.download.fetch import Fetcher
from tasks.download.fetch_outcome import NETWORK, RETRYABLE, Outcome, outcome_of, retry_after_s
from tasks.tables.parquet_tables import cut_tables

SHARD_DIGITS = 6
"""Digits of a shard's number in file names and keys: enough for 10^10 rows at 10,000 a shard."""
URL_COLUMN = "url"
CAPTION_COLUMN = "caption"
MERGED_HASH = "image_hash"
"""What the merge calls the column that download.hash_column names."""
REQUIRED_COLUMNS = ("uid", "source", URL_COLUMN, CAPTION_COLUMN)
WRITTEN_COLUMNS = (
    *("key", "status", "error_message", "exif", "md5", "sha256", "sha512"),
    *("width", "height", "original_width", "original_height"),
)
"""What img2dataset writes itself, so that rows may not bring it."""


@dataclass(frozen=True)
class PlannedShard:
    """A run of rows of one merged file; img2dataset never lets a shard cross files."""

    number: int
    source: str
    rows: int

    @property
    def name(self) -> str:
        return f"{self.number:0{SHARD_DIGITS}d}"


@dataclass(frozen=True)
class Plan:
    files: tuple[Path, ...]
    """Merged parquet files in the order in which their shards are numbered."""
    extra_columns: tuple[str, ...]
    """Columns besides url and caption that go into every sample's record."""
    shards: tuple[PlannedShard, ...]
    fingerprint: str
    """Changes with the config and with the rows; SHA-256 in hex."""

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)


def plan_download(rows: Path, config: DownloadConfig, first_number: int = 0) -> Plan:
    """Read the metadata of `rows/<source>/*.parquet` and number the shards from `first_number`."""
    files = sorted(rows.glob("*/*.parquet"))
    metadata = {file: _check_columns(file, config) for file in files}
    shards: list[PlannedShard] = []
    for file, (in_file, _) in metadata.items():
        for begin in range(0, in_file, config.samples_per_shard):
            in_shard = min(config.samples_per_shard, in_file - begin)
            shards.append(PlannedShard(first_number + len(shards), file.parent.name, in_shard))
    if not shards:
        raise InputError(f"{rows} holds no rows to download: look at the merge's drop reasons")
    columns = {tuple(names) for _, names in metadata.values()}
    if len(columns) > 1:
        raise InputError(f"the parquet files of {rows} differ in their columns: merge again")
    extra = tuple(name for name in columns.pop() if name not in (URL_COLUMN, CAPTION_COLUMN))
    decides = {
        "config": config.compute_identity(),
        "files": [
            (str(file.relative_to(rows)), in_file, file.stat().st_size)
            for file, (in_file, _) in metadata.items()
        ],
    }
    fingerprint = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return Plan(tuple(files), extra, tuple(shards), fingerprint)


def hash_column_of(names: Sequence[str], config: DownloadConfig) -> str | None:
    """The column that holds the hashes to compare: of its own name, or of the merge's."""
    wanted = (config.hash_column, MERGED_HASH) if config.hash_column else ()
    return next((name for name in wanted if name in names), None)


def expected_bytes(rows: int, image_px: int) -> int:
    """About how much disk `rows` samples need: JPEGs of quality 95 take 0.4 bytes a pixel (LAION at
    256 px: 25 KB each), a tar adds three padded headers, a caption and a record of 1 KB."""
    return rows * math.ceil(0.4 * image_px**2 + 4096)


def _check_columns(file: Path, config: DownloadConfig) -> tuple[int, list[str]]:
    """(rows, column names) of a parquet file whose columns were checked."""
    try:
        parquet = pq.ParquetFile(file)
        schema, rows = parquet.schema_arrow, int(parquet.metadata.num_rows)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{file} cannot be read as parquet ({error}): merge again") from error
    for name in REQUIRED_COLUMNS:
        if name not in schema.names:
            raise InputError(f"{file} has no column '{name}': it is not of a finished merge")
    if config.hash_column and hash_column_of(schema.names, config) is None:
        raise InputError(
            f"{file} has no column '{config.hash_column}': set download.hash_column to one of "
            f"{', '.join(schema.names)}, or leave it empty"
        )
    for field in schema:
        if field.name in WRITTEN_COLUMNS:
            raise InputError(
                f"{file}: column '{field.name}' has the name of one that the download adds: "
                "give it another in the merge"
            )
        # img2dataset writes records as JSON and loses whole samples, silently, when it cannot
        kind, fits = (
            field.type,
            (pa.string(), pa.large_string(), pa.bool_(), pa.float32(), pa.float64()),
        )
        if kind not in fits and not pa.types.is_integer(kind):
            raise InputError(
                f"{file}: column '{field.name}' is {field.type}, but records hold only "
                "text, numbers and true/false: cast it in the merge"
            )
    return rows, list(schema.names)


SHARDS_PER_FILE = 20
"""Shards' worth of rows in one file of rows; so many are in memory at once."""
HOSTS = 16
"""Hosts that have to be silent before the network is held to be down; all are asked at once."""
LONGEST_S = 5.0
"""Time for one host."""


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


def verdict_file(counters: Path, shard: int) -> Path:
    """File in which the maker of a shard leaves what it found, a ledger of one line."""
    return counters / f"{shard}.checked"


class Ledger:
    """The whole shards of one folder, as the file at `path` remembers them; tars that an `outbox`
    moved away are as whole as they were."""

    def __init__(self, path: Path, folder: Path, outbox: Outbox | None = None) -> None:
        self._path = path
        self._folder = folder
        self._outbox = outbox or Outbox(folder)
        self._known: dict[PlannedShard, tuple[FinishedShard, list[tuple[int, int]]]] = {}
        self._take_lines(path)

    def take_verdict(self, path: Path) -> None:
        """Take over what the maker of a shard found, if it left that at `path`."""
        for finished, stamp in self._take_lines(path):
            self._remember(finished, stamp)
        path.unlink(missing_ok=True)

    def _take_lines(self, path: Path) -> list[tuple[FinishedShard, list[tuple[int, int]]]]:
        taken = []
        for line in path.read_bytes().splitlines() if path.exists() else ():
            with suppress(ValueError):  # a line that a kill cut short is nothing
                entry = _LINE.validate_json(line)
                self._known[entry[0].planned] = entry
                taken.append(entry)
        return taken

    def _remember(self, finished: FinishedShard, stamp: list[tuple[int, int]]) -> None:
        self._known[finished.planned] = finished, stamp
        with self._path.open("ab") as file:
            file.write(_LINE.dump_json((finished, stamp)) + b"\n")

    def check_planned(self, planned: PlannedShard) -> FinishedShard:
        """The shard as remembered, or as `check_shard` finds it now."""
        try:
            files = shard_files(self._folder, planned)
            stamp: list[tuple[int, int]] = [self._outbox.state_of(path) for path in files]
        except OSError as error:
            raise BrokenShard(f"shard {planned.name} is unfinished: {error}") from error
        known, before = self._known.get(planned, (None, None))
        if known is None or before != stamp:
            known = check_shard(self._folder, planned)
            self._remember(known, stamp)
        return known


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
    does (a refusal is an answer), or if no shard holds an image. The newest shards' are asked."""
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

    hosts: dict[str, str] = {}
    for shard in reversed(finished):
        table = pq.read_table(
            shard_files(shards, shard.planned)[1],
            columns=[URL_COLUMN],
            filters=pc.field("status") == "success",
        )
        for url in table[URL_COLUMN].to_pylist():
            hosts.setdefault(urlsplit(url).netloc, url)
        if len(hosts) >= HOSTS:
            break
    asked = list(hosts.values())[:HOSTS]
    with ThreadPoolExecutor(HOSTS, "witness") as pool:
        return 0 if any(pool.map(answers, asked)) else len(asked)
