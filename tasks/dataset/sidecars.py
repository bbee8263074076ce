"""Sidecars: further captions of samples that are stored already, as people bring them.

Not here: finding the samples (tasks/index/caption_join.py), drawing one in training
(evaclip_model/reading/captions.py).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from evaclip_model.errors import InputError
from evaclip_model.reading.captions import write_captions
from evaclip_model.reading.samples import MAX_TEXT_BYTES
from tasks.dataset.config import CAPTIONS, CaptionKey, CaptionSource
from tasks.index.caption_join import ASKED, iterate_joined, join_captions, normalize_key
from tasks.index.sample_index import SampleIndex
from tasks.progress import Report
from tasks.tables.parquet_tables import parquet_schema, read_parquet_rows
from tasks.tables.text_tables import column_names, parse_list, read_text_table, text_format

KEYS: tuple[str, ...] = get_args(CaptionKey)
CAPTION_COLUMNS = ("caption", "text", "TEXT", "captions", "recaption", "re_caption")
ROWS_AT_ONCE = 1 << 14
Counts = dict[str, dict[str, int]]


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
        several = parse_list(written) if kind == "jsonl" and written else None
        yield row.values.get(key), several if several is not None else [written]


def _clean_caption(text: Any) -> str:
    """A caption that can be shown; empty for what is none, not UTF-8, or longer than is read."""
    with suppress(UnicodeDecodeError):
        caption = text.decode() if isinstance(text, bytes) else text
        if isinstance(caption, str) and len(caption) <= MAX_TEXT_BYTES:
            return caption.strip()
    return ""
