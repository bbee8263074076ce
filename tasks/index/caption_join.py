"""Captions from elsewhere joined to the samples of an index, in bounded memory: what does not fit
goes to disk. Not here: reading the files that people bring (tasks/dataset/sidecars.py)."""

import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.index.sample_index import ADDRESS, SampleIndex, open_database, without_scheme

ASKED = pa.schema([("number", pa.int64()), ("value", pa.string()), ("caption", pa.string())])
"""One caption: number of its row, the sample's key as `normalize_key` writes it, the text."""
ROWS_AT_ONCE = 10_000
ROWS_OF_PART = 500_000
"""Captions that are joined at once: a hash join of more needs more than its limit, however much of
it goes to disk."""
_PLAIN = """CASE WHEN regexp_full_match({0}, '[0-9]+')
    THEN coalesce(nullif(ltrim({0}, '0'), ''), '0') ELSE {0} END"""
_VALUES = {
    "uid": f"[{_PLAIN.format('uid')}]",
    "url": f"[{ADDRESS}]",
    "sha256": "[sha256, stored_sha256]",
    "key": f"[{_PLAIN.format('key')}]",
}
"""What names a sample, of its row."""
_STORED = {
    "sha256": "SELECT DISTINCT value, shard, key FROM read_parquet($stored)",
    # shards of several makers may have the same keys: one that names two samples names none
    "key": "SELECT value, any_value(shard) AS shard, any_value(key) AS key "
    "FROM read_parquet($stored) GROUP BY value HAVING count(*) = 1",
}


def normalize_key(by: str, value: Any) -> str | None:
    """A key as it is compared: numbers by their value, whatever type they have; None for none."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "" if value is None else str(value).strip()
    if by == "url":
        text = without_scheme(text)
    elif by == "sha256":
        text = text.lower()
    elif text.isascii() and text.isdigit():
        return text.lstrip("0") or "0"
    return text or None


def join_captions(
    index: SampleIndex, by: str, source: str | None, asked: Path, folder: Path
) -> int:
    """Write (shard, key, number, caption) of every sample of `source` (None: of all) that a row of
    `asked`, a parquet file of `ASKED`, names `by` its uid, url, sha256, or key in its shard, into
    files in `folder`, which is made; returns how many rows name one."""
    folder.mkdir()
    parts = pq.read_metadata(asked).num_rows // ROWS_OF_PART + 1
    stored = f"""SELECT unnest({_VALUES[by]}) AS value, shard, key FROM read_parquet($files)
        WHERE source = coalesce($source, source)"""
    cut: dict[str, tuple[str, dict[str, Any]]] = {
        "stored": (stored, {"files": list(map(str, index.files)), "source": source}),
        "asked": ("FROM read_parquet($files)", {"files": [str(asked)]}),
    }
    with TemporaryDirectory(dir=folder) as beside:
        with open_database(index.memory_limit, folder) as query:
            query.execute(f"SET partitioned_write_flush_threshold = {ROWS_AT_ONCE}")
            for name, (select, given) in cut.items():
                query.execute(
                    f"""COPY (SELECT *, hash(value) % {parts} AS part FROM ({select}))
                    TO $target (FORMAT parquet, PARTITION_BY (part))""",
                    {**given, "target": f"{beside}/{name}"},
                )
        for part in range(parts):
            files = {name: f"{beside}/{name}/part={part}" for name in cut}
            if not all(map(os.path.isdir, files.values())):
                continue
            with open_database(index.memory_limit, folder) as query:
                query.execute(
                    f"""COPY (SELECT shard, key, number, caption FROM read_parquet($asked)
                    JOIN ({_STORED.get(by, "FROM read_parquet($stored)")}) USING (value))
                    TO $target (FORMAT parquet)""",
                    {name: f"{file}/*.parquet" for name, file in files.items()}
                    | {"target": str(folder / f"{part:04d}.parquet")},
                )
    with open_database(index.memory_limit, folder) as query:
        counted = "SELECT count(DISTINCT number) FROM read_parquet($files)"
        joined = list(map(str, folder.glob("*.parquet")))
        found = query.execute(counted, {"files": joined}).fetchone() if joined else None
    return int(found[0]) if found else 0


def iterate_joined(
    index: SampleIndex, named: Sequence[tuple[str, Path]], spill: Path
) -> Iterator[tuple[int, list[tuple[str, dict[str, list[str]]]]]]:
    """Yield (shard, [(key, name -> captions)]) of the (name, folder of `join_captions`), sorted."""
    select = "SELECT {0} AS place, * FROM read_parquet($files{0})"
    parts = " UNION ALL ".join(map(select.format, range(len(named))))
    files = {
        f"files{place}": list(map(str, folder.glob("*.parquet")))
        for place, (_, folder) in enumerate(named)
    }
    target = spill / "sorted.parquet"
    # to a file: a result that is fetched would be held in memory first
    with open_database(index.memory_limit, spill) as query:
        query.execute(
            f"""COPY (FROM ({parts}) ORDER BY shard, key, place, number, caption)
            TO $target (FORMAT parquet)""",
            {**files, "target": str(target)},
        )
    with pq.ParquetFile(target) as file:
        rows = (row for batch in file.iter_batches(ROWS_AT_ONCE) for row in batch.to_pylist())
        for shard, in_shard in groupby(rows, key=lambda row: int(row["shard"])):
            samples = []
            for key, found in groupby(in_shard, key=lambda row: str(row["key"])):
                captions: dict[str, list[str]] = {}
                for row in found:
                    captions.setdefault(named[row["place"]][0], []).append(row["caption"])
                samples.append((key, captions))
            yield shard, samples
