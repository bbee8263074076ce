"""Sidecars: further captions of samples that are stored already, as people bring them, joined to
the samples of an index in bounded memory: what does not fit goes to disk.

Not here: drawing one in training (evaclip_model/reading/samples.py).
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import groupby, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from evaclip_model.errors import InputError
from evaclip_model.reading.samples import MAX_TEXT_BYTES, write_captions
from tasks.dataset.config import CAPTIONS, CaptionKey, CaptionSource
from tasks.index.sample_index import ADDRESS, SampleIndex, open_database, without_scheme
from tasks.progress import Report
from tasks.tables.parquet_tables import parquet_schema, read_parquet_rows
from tasks.tables.text_tables import column_names, parse_list, read_text_table, text_format

KEYS: tuple[str, ...] = get_args(CaptionKey)
CAPTION_COLUMNS = ("caption", "text", "TEXT", "captions", "recaption", "re_caption")
ROWS_AT_ONCE = 10_000
Counts = dict[str, dict[str, int]]
ASKED = pa.schema([("number", pa.int64()), ("value", pa.string()), ("caption", pa.string())])
"""One caption: number of its row, the sample's key as `normalize_key` writes it, the text."""
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


def shard_captions(shard: int) -> str:
    """The file of a shard's captions, below the version's folder, by its number in the index."""
    return f"{CAPTIONS}/{shard:06d}.jsonl.gz"


def write_sidecars(
    index: SampleIndex,
    sidecars: Sequence[tuple[CaptionSource, Sequence[str]]],
    out: Path,
    report: Report,
) -> Counts:
    """Join sidecars (config, files) to the samples of `index`; write a file a shard below `out`.
    Returns what became of their rows, by the sidecar's name. InputError: a file cannot be read or
    lacks a column; no row of a sidecar finds a sample."""
    counts: Counts = {}
    with TemporaryDirectory(prefix=".join-", dir=out) as spill:
        joined = []
        for place, (config, files) in enumerate(sidecars):
            report(place, len(sidecars), f"captions '{config.name}'")
            asked, target = Path(spill, f"asked{place}"), Path(spill, f"joined{place}")
            by, found = _write_asked(config, files, asked)
            matched = join_captions(index, by, config.source, asked, target)
            usable = found["rows"] - found["unusable"]
            found |= {"matched": matched, "without_sample": usable - matched}
            if not matched:
                raise InputError(
                    f"captions '{config.name}': none of {found['rows']:,} rows of {config.files} "
                    f"names a sample by its {by}: set 'key' and 'key_column', or leave it out"
                )
            asked.unlink()
            counts[config.name] = found
            joined.append((config.name, target))
        (out / CAPTIONS).mkdir(exist_ok=True)
        for shard, samples in iterate_joined(index, joined, Path(spill)):
            write_captions(out / shard_captions(shard), samples)
    return counts


def _write_asked(
    config: CaptionSource, files: Sequence[str], target: Path
) -> tuple[str, dict[str, int]]:
    """Write all captions as `ASKED`; returns what their key is, and the count of rows."""
    found: Counter[str] = Counter(rows=0, unusable=0)
    by: str | None = config.key

    def iterate_captions() -> Iterator[tuple[int, str, str]]:
        nonlocal by
        for file in files:
            by, rows = _read_file(config, file, by)
            for value, texts in rows:
                key = normalize_key(by, value)
                captions = [text for one in texts if (text := _clean_caption(one))] if key else []
                for text in captions:
                    yield found["rows"], key or "", text
                found.update(rows=1, unusable=not captions)

    captions = iterate_captions()
    with pq.ParquetWriter(target, ASKED, compression="zstd") as writer:
        while some := [*islice(captions, ROWS_AT_ONCE)]:
            columns = [pa.array(column) for column in zip(*some, strict=True)]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=ASKED))
    assert by is not None, "there is a file"
    return by, dict(found)


def _read_file(
    config: CaptionSource, file: str, by: str | None
) -> tuple[str, Iterator[tuple[Any, list[Any]]]]:
    """The kind of the rows' key, and (key, captions) of every row; those of a line that is none are
    empty."""
    where, kind = f"captions '{config.name}'", text_format(file)
    if kind is None:
        names = parquet_schema(file, where).names
    else:
        names = column_names(file, kind, "auto", True)
    key = config.key_column or by or next((name for name in KEYS if name in names), None)
    text = config.caption or next((name for name in CAPTION_COLUMNS if name in names), None)
    for part, name in (("key", key), ("caption", text)):
        if name not in names:
            said = f"no column '{name}'" if name else f"no column that is its {part}"
            setting = "key' and 'key_column" if part == "key" else part
            raise InputError(
                f"{where}: {file} has {said}, its columns are {', '.join(names) or 'none'}: set "
                f"'{setting}'"
            )
    assert key is not None and text is not None, "refused above"
    return by or key, _read_rows(file, key, text)


def _read_rows(file: str, key: str, text: str) -> Iterator[tuple[Any, list[Any]]]:
    kind = text_format(file)
    if kind is None:
        for value, texts in read_parquet_rows(file, (key, text), ROWS_AT_ONCE):
            yield value, texts if isinstance(texts, list) else [texts]
        return
    for row in read_text_table(file, kind):
        written = row.values.get(text)
        several = parse_list(written, kind) if written else None
        yield row.values.get(key), several if several is not None else [written]


def _clean_caption(text: Any) -> str:
    """A caption that can be shown; empty for what is none, not UTF-8, or longer than is read."""
    with suppress(UnicodeDecodeError):
        caption = text.decode() if isinstance(text, bytes) else text
        if isinstance(caption, str) and len(caption) <= MAX_TEXT_BYTES:
            return caption.strip()
    return ""


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
