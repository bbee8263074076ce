"""The rows of every shard, decided before anything is downloaded: files of rows whose columns
img2dataset can keep, shards numbered as it will, and a fingerprint of all that a half-finished
folder must agree with."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from evaclip_model.errors import InputError
from tasks.download.config import DownloadConfig

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
FLOATS = (pa.float32(), pa.float64())


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
        kind, fits = field.type, (pa.string(), pa.large_string(), pa.bool_(), *FLOATS)
        if kind not in fits and not pa.types.is_integer(kind):
            raise InputError(
                f"{file}: column '{field.name}' is {field.type}, but records hold only "
                "text, numbers and true/false: cast it in the merge"
            )
    return rows, list(schema.names)
