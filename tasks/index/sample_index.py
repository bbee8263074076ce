"""Every sample that was stored, findable by uid, URL or hash in seconds among a hundred million;
and the verdicts of a verification on its shards, which lie between the stages verify and dataset.

Not here: looking into shards (tasks/verify), deciding what is left out (tasks/dataset).

    index/rows/00000.parquet   a row a sample, ordered by shard and place; `row` counts through
    index/by_uid.parquet       (mark, row), ordered by mark; so are by_url and by_hash

A mark is the lower half of the MD5 of a uid, of a URL without its scheme, or of a hash in hex.
Because a look-up table is ordered by mark, its row groups' statistics lead to the few thousand rows
that may hold one; because rows are ordered, so do theirs. Marks may collide, so that what is found
is compared with what was asked for.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from evaclip_model.config import Config
from evaclip_model.files import replace_file, write_atomically
from evaclip_model.reading.samples import Shard
from evaclip_model.reading.urls import is_url
from tasks.tables.parquet_tables import cut_tables

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

INDEX = "index"
ROWS_PER_FILE = 5_000_000
ROWS_PER_GROUP = 1 << 17
"""A look-up reads one group: small enough for milliseconds, large enough to compress."""
LOOKUP_ROWS_PER_GROUP = 1 << 16
COLUMNS = pa.schema(
    [
        ("key", pa.string()),  # in its shard
        ("uid", pa.string()),
        ("source", pa.string()),
        ("original_id", pa.string()),  # the metadata collection's own row id
        ("url", pa.string()),
        ("sha256", pa.string()),  # of the file as it was downloaded; none when not recorded
        ("stored_sha256", pa.string()),  # of the image as it lies in the shard
        ("md5", pa.string()),  # of the download where that was recorded, else of what is stored
        ("phash", pa.uint64()),  # none when the image cannot be decoded
        ("flaw", pa.string()),  # why the sample cannot be used; none = it can
    ]
)
"""What is known of a sample, by its place in the shard; the shard's number and `row` are added."""
ASKED_AT_ONCE = 10_000
"""Marks or rows that lead to their row groups alone; with more of them, all groups are read."""
ADDRESS = r"regexp_replace(url, '^https?://', '')"
MEMORY_LIMIT = "2GB"
"""Of a query, where no setting says another."""
GROUPS_AT_ONCE = 16
"""Row groups of a look-up table that a thread holds."""
CHECKED = "checked.json"


class Kind(StrEnum):
    """A key by which samples are found; a hash is SHA-256 or MD5 in hex, downloaded or stored."""

    UID = "uid"
    URL = "url"
    HASH = "hash"


_MARKED = {
    Kind.UID: "SELECT uid AS value, row FROM stored",
    Kind.URL: f"SELECT {ADDRESS} AS value, row FROM stored WHERE url IS NOT NULL",
    Kind.HASH: "SELECT sha256 AS value, row FROM stored UNION ALL "
    "SELECT stored_sha256, row FROM stored WHERE stored_sha256 IS DISTINCT FROM sha256 UNION ALL "
    "SELECT md5, row FROM stored",
}
_MATCHES = {
    Kind.UID: "uid IN (FROM asked)",
    Kind.URL: f"{ADDRESS} IN (FROM asked)",
    Kind.HASH: "sha256 IN (FROM asked) OR stored_sha256 IN (FROM asked) OR md5 IN (FROM asked)",
}


def write_index(tables: Iterable[Path], folder: Path, memory_limit: str) -> None:
    """Make the index of the shards whose tables (of `COLUMNS`) are given, in their order.

    Files that a killed run finished are kept. Memory does not depend on the number of samples: what
    a row group takes, on every core, and then the database's.
    """
    rows = folder / "rows"
    rows.mkdir(parents=True, exist_ok=True)
    groups = list(_group_tables(tables))
    files = [rows / f"{number:05d}.parquet" for number in range(len(groups))]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(_write_rows, groups, files))
    for kind in Kind:
        pairs = f"""
            WITH stored AS (FROM read_parquet($rows)), marked AS ({_MARKED[kind]})
            SELECT md5_number_lower(value) AS mark, row FROM marked WHERE value IS NOT NULL"""
        given = {"rows": list(map(str, files))}
        _sort_marks(pairs, given, folder / lookup_name(kind), memory_limit)


def join_indexes(parts: Sequence[tuple[Path, int, int]], folder: Path) -> None:
    """Make one index of several (the folder that holds its `index/`, its first row and first shard
    in here), in their order; files that a killed run finished are kept."""
    rows = folder / "rows"
    rows.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    marked: list[tuple[Path, int]] = []
    for part, first_row, first_shard in parts:
        marked.append((part / INDEX, first_row))
        for source in sorted((part / INDEX / "rows").glob("*.parquet")):
            target = rows / f"{len(files):05d}.parquet"
            if not target.exists() and first_row == first_shard == 0:
                link_or_copy(source, target)
            elif not target.exists():
                _renumber_table(source, first_row, first_shard, target)
            files.append(target)
    for kind in Kind:
        # Their marks are there already: neither the rows' texts nor hashes of them are read again.
        pairs = " UNION ALL ".join(
            f"SELECT mark, row + {first_row:d} AS row FROM read_parquet($part{number})"
            for number, (_, first_row) in enumerate(marked)
        )
        given = {f"part{n}": str(one / lookup_name(kind)) for n, (one, _) in enumerate(marked)}
        _sort_marks(pairs, given, folder / lookup_name(kind), MEMORY_LIMIT)


class SampleIndex:
    """The index in the folder of a verification or a join, open for reading; `memory_limit` is a
    query's, as DuckDB writes it."""

    def __init__(self, folder: Path, memory_limit: str = MEMORY_LIMIT) -> None:
        self._folder = folder / INDEX
        self.memory_limit = memory_limit
        self.files = sorted((self._folder / "rows").glob("*.parquet"))
        self.rows = sum(pq.read_metadata(file).num_rows for file in self.files)

    def find_samples(self, kind: Kind, values: Sequence[str]) -> list[dict[str, Any]]:
        """The samples that have one of `values` (URLs as merge writes them, hashes in lower case),
        by row: dicts of `COLUMNS` with `row`, `shard` (number) and `place` (in the shard)."""
        if not values or not self.files:
            return []
        query = f"""
            SELECT * FROM read_parquet($rows)
            WHERE row IN (
                SELECT row FROM read_parquet($lookup)
                WHERE mark IN (SELECT md5_number_lower(value) FROM asked)
            ) AND ({_MATCHES[kind]})
            ORDER BY row"""
        asked = {without_scheme(value) if kind is Kind.URL else value for value in values}
        paths = {"rows": list(map(str, self.files)), "lookup": str(self._lookup(kind))}
        with open_database(self.memory_limit, self._folder) as database:
            database.register("asked", pa.table({"value": pa.array(sorted(asked), pa.string())}))
            return list(database.execute(query, paths).to_arrow_table().to_pylist())

    def find_listed(self, uids: Iterable[pa.Array]) -> npt.NDArray[np.bool_]:
        """Tell of every row whether its uid is among `uids`, [rows]."""
        query = "SELECT row FROM read_parquet($rows) SEMI JOIN listed USING (uid)"
        listed = pa.table({"uid": pa.chunked_array(uids, pa.string())})
        found = np.zeros(self.rows, dtype=np.bool_)
        if not self.files:
            return found
        with open_database(self.memory_limit, self._folder) as database:
            database.register("listed", listed)
            result = database.execute(query, {"rows": list(map(str, self.files))})
            for batch in result.fetch_record_batch():
                found[batch["row"].to_numpy()] = True
        return found

    def iterate_chunks(self, *columns: str) -> Iterator[pa.Table]:
        """These columns of all rows, in their order, a row group at a time."""
        for file in self.files:
            with pq.ParquetFile(file) as parquet:
                for group in range(parquet.num_row_groups):
                    yield parquet.read_row_group(group, columns=list(columns))

    def rows_of_shard(self, shard: int, *columns: str) -> pa.Table:
        """These columns of a shard's rows, in stored order."""
        return pq.read_table(self.files, columns=list(columns), filters=[("shard", "==", shard)])

    def find_repeated(self, kind: Kind, among: Mask) -> Iterator[npt.NDArray[np.int64]]:
        """Of the rows that the mask `among` [rows] has, those that share a uid, or an image (as
        downloaded or as stored), with another of them: batches [3, n] of row, ascending, what it
        shares as a number below `self.rows`, and the first row that has it. A row that shares two
        things is there twice, in one batch. The mask and another one are all that memory holds
        beside the database and a batch.
        """
        if kind is Kind.URL:
            raise ValueError(f"rows may well share a {kind}")
        values = "[uid]" if kind is Kind.UID else "[sha256, nullif(stored_sha256, sha256)]"
        # 128 bits stand for a text: they take a quarter of its memory, and none are equal by chance
        add = f"""
            INSERT INTO suspects SELECT row, md5_number(value) FROM (
                SELECT row, unnest({values}) AS value FROM read_parquet($file)
                WHERE row IN (FROM suspected)
            ) WHERE value IS NOT NULL"""
        query = """
            WITH repeated AS (
                SELECT value, min(row) AS first FROM suspects GROUP BY value HAVING count(*) > 1
            ), numbered AS (SELECT *, row_number() OVER () - 1 AS number FROM repeated)
            SELECT row, number, first FROM suspects JOIN numbered USING (value) ORDER BY row"""
        suspected = _rows_with_equal_marks(self._lookup(kind), self.rows)
        suspected &= among
        start, rest = 0, np.empty((3, 0), dtype=np.int64)
        with open_database(self.memory_limit, self._folder) as database:
            database.execute("CREATE TABLE suspects (row BIGINT, value UHUGEINT)")
            for file in self.files:
                mine = suspected[start : start + pq.read_metadata(file).num_rows]
                database.register("suspected", pa.table({"row": start + np.flatnonzero(mine)}))
                database.execute(add, {"file": str(file)})
                start += len(mine)
            for batch in database.execute(query).fetch_record_batch(ROWS_PER_GROUP):
                found = np.hstack([rest, np.stack([column.to_numpy() for column in batch])])
                whole = np.searchsorted(found[0], found[0, -1])  # its other one may come
                yield found[:, :whole]
                rest = found[:, whole:]
        yield rest

    def _lookup(self, kind: Kind) -> Path:
        return self._folder / lookup_name(kind)


def lookup_name(kind: Kind) -> str:
    return f"by_{kind}.parquet"


def _group_tables(tables: Iterable[Path]) -> Iterator[tuple[int, list[tuple[int, Path]]]]:
    """Runs of (number, table) with about `ROWS_PER_FILE` rows together, behind their first row."""
    group: list[tuple[int, Path]] = []
    start = stop = 0
    for number, table in enumerate(tables):
        group.append((number, table))
        stop += pq.read_metadata(table).num_rows
        if stop - start >= ROWS_PER_FILE:
            yield start, group
            group, start = [], stop
    if group:
        yield start, group


def _write_rows(run: tuple[int, list[tuple[int, Path]]], target: Path) -> None:
    """Write the file of the rows of a run of `_group_tables`, if it is not there yet."""
    if target.exists():
        return
    first_row, tables = run
    added = [("row", pa.int64()), ("shard", pa.int32()), ("place", pa.int32())]
    schema = pa.schema([*added, *COLUMNS])

    def number_rows(first: int) -> Iterator[pa.Table]:
        for number, file in tables:
            table = pq.read_table(file, schema=COLUMNS)
            size = table.num_rows
            columns = (np.arange(first, first + size), np.full(size, number), np.arange(size))
            yield pa.Table.from_arrays([*columns, *table.columns], schema=schema)
            first += size

    with (
        replace_file(target) as beside,
        pq.ParquetWriter(beside, schema, compression="zstd") as writer,
    ):
        for group in cut_tables(number_rows(first_row), ROWS_PER_GROUP):
            writer.write_table(group)


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """The same file under another name; a copy where it would be on another disk."""
    try:
        os.link(source, target)
    except OSError:
        with replace_file(Path(target)) as beside:
            shutil.copyfile(source, beside)


def _renumber_table(source: Path, first_row: int, first_shard: int, target: Path) -> None:
    with (
        replace_file(target) as beside,
        pq.ParquetFile(source) as parquet,
        pq.ParquetWriter(beside, parquet.schema_arrow, compression="zstd") as writer,
    ):
        for group in range(parquet.num_row_groups):
            table = parquet.read_row_group(group)
            shards = pc.add(table["shard"], pa.scalar(first_shard, pa.int32()))
            columns = [pc.add(table["row"], first_row), shards, *table.columns[2:]]
            writer.write_table(pa.Table.from_arrays(columns, schema=table.schema), ROWS_PER_GROUP)


def _sort_marks(pairs: str, given: Mapping[str, Any], target: Path, memory_limit: str) -> None:
    """Write a look-up table that is not there yet, of the `pairs` (mark, row) that a query finds;
    they are sorted on disk when they do not fit into memory."""
    if target.exists():
        return
    query = f"""
        COPY ({pairs} ORDER BY mark, row)
        TO $target (FORMAT parquet, ROW_GROUP_SIZE {LOOKUP_ROWS_PER_GROUP}, CODEC zstd,
            PARQUET_VERSION v2)"""  # version 2 stores differences: marks ascend
    with replace_file(target) as beside, open_database(memory_limit, target.parent) as database:
        database.execute(query, {**given, "target": str(beside)})


def _rows_with_equal_marks(lookup: Path, rows: int) -> Mask:
    """Mask [rows] of those whose mark another has too: neighbours, because marks are in order."""
    found, metadata = np.zeros(rows, dtype=np.bool_), pq.read_metadata(lookup)
    groups = list(range(metadata.num_row_groups))

    def look_at_groups(first: int) -> None:
        """Look at some row groups, and at the one before them for its last mark."""
        with pq.ParquetFile(lookup, metadata=metadata) as parquet:
            table = parquet.read_row_groups(groups[max(0, first - 1) : first + GROUPS_AT_ONCE])
        marks, places = table["mark"].to_numpy(), table["row"].to_numpy()
        same = marks[1:] == marks[:-1]
        found[places[1:][same]] = found[places[:-1][same]] = True

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(look_at_groups, groups[::GROUPS_AT_ONCE]))
    return found


@contextmanager
def open_database(memory_limit: str, spill: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """An empty database that spills beside the index; closed whatever happens."""
    with TemporaryDirectory(prefix=".spill-", dir=spill) as folder:
        settings: dict[str, Any] = {
            "memory_limit": memory_limit,
            "temp_directory": folder,
            "preserve_insertion_order": False,
            "dynamic_or_filter_threshold": ASKED_AT_ONCE,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
        }
        with duckdb.connect(":memory:", config=settings) as connection:
            yield connection


def without_scheme(url: str) -> str:
    return url.partition("://")[2] or url


class ShardVerdict(Config):
    path: str
    """Of the tar, relative to the verification's folder; or its URL."""
    stored: int
    """Samples that could be read, bad ones included: its rows in the index."""
    shard: Shard | None
    """All its samples, none left out yet; None if it must not be read."""
    flaws: dict[str, int]
    """Bad samples by reason; each counts once."""
    left_out: str | None


def write_verdicts(verdicts: Sequence[ShardVerdict], folder: Path) -> None:
    """Write the verdicts on all shards, in the order of their numbers in the index."""
    lines = ",\n".join(verdict.model_dump_json() for verdict in verdicts)
    write_atomically(folder / CHECKED, f"[\n{lines}\n]\n")


def read_verdicts(folder: Path) -> list[ShardVerdict]:
    """The verdicts of a finished verification, by shard number."""
    path = folder / CHECKED
    return [ShardVerdict.from_mapping(one, where=str(path)) for one in json.loads(path.read_text())]


def relative_path(location: Path | str, folder: Path) -> str:
    """A shard's name in a file of `folder`: a URL as it is, a path relative to the folder."""
    return str(location) if is_url(location) else os.path.relpath(location, folder)


def shard_location(folder: Path, path: str) -> str:
    """The place of a shard that a file of `folder` names so."""
    return path if is_url(path) else str(folder / path)
