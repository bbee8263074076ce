"""Captions from elsewhere joined to the samples of an index, in bounded memory: what does not fit
goes to disk. Not here: reading the files that people bring (tasks/dataset/sidecars.py)."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
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
    "uid": f"SELECT {_PLAIN.format('uid')} AS value, shard, key FROM stored",
    "url": f"SELECT {ADDRESS} AS value, shard, key FROM stored",
    "sha256": "SELECT sha256 AS value, shard, key FROM stored UNION "
    "SELECT stored_sha256, shard, key FROM stored",
    # shards of several makers may have the same keys: one that names two samples names none
    "key": f"SELECT {_PLAIN.format('key')} AS value, any_value(shard) AS shard, "
    "any_value(key) AS key FROM stored GROUP BY 1 HAVING count(*) = 1",
}
_WITH = "WITH stored AS (FROM read_parquet($rows) WHERE source = coalesce($source, source)), "


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
    given = {"rows": list(map(str, index.files)), "source": source, "asked": str(asked)}
    named = 0
    for part in range(parts):
        mine = f"hash(value) % {parts} = {part}"
        tables = f"""{_WITH} valued AS (FROM ({_VALUES[by]}) WHERE {mine}),
            asked AS (FROM read_parquet($asked) WHERE {mine})"""
        with open_database(index.memory_limit, folder) as query:
            query.execute(
                f"""COPY ({tables} SELECT shard, key, number, caption
                FROM asked JOIN valued USING (value)) TO $target (FORMAT parquet)""",
                {**given, "target": str(folder / f"{part:04d}.parquet")},
            )
            counted = "SELECT count(DISTINCT number) FROM asked SEMI JOIN valued USING (value)"
            found = query.execute(f"{tables} {counted}", given).fetchone()
            named += int(found[0]) if found else 0
    return named


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
