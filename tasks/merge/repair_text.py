"""Parquet files with texts that are not UTF-8: a copy in which such a text is none.

Covers: telling the database's complaint, the copy.
Not here: when it is needed (units.py).
"""

from __future__ import annotations

from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.merge.metadata_files import file_system, is_url
from tasks.merge.schema import BROKEN_TEXT

ROWS_AT_ONCE = 50_000


def is_about_encoding(error: duckdb.Error) -> bool:
    """Whether the database refuses a file for a text that is not UTF-8."""
    said = str(error).lower()
    return "invalid string encoding" in said or "invalid unicode" in said or "utf8" in said


def repair_text(path: str, target: Path) -> None:
    """Write the rows of a parquet file in their order; a text that is not UTF-8 is none, and its
    row is true in the column `BROKEN_TEXT`."""
    with file_system(path).open(path, "rb") if is_url(path) else open(path, "rb") as raw:
        source = pq.ParquetFile(raw)
        fields = [*source.schema_arrow.remove_metadata(), pa.field(BROKEN_TEXT, pa.bool_())]
        schema = pa.schema(fields)
        with pq.ParquetWriter(target, schema, compression="zstd") as writer:
            for batch in source.iter_batches(ROWS_AT_ONCE):
                broken = [False] * batch.num_rows
                columns = [_repaired(column, broken) for column in batch.columns]
                writer.write_table(pa.table([*columns, pa.array(broken)], schema=schema))


def _repaired(column: pa.Array, broken: list[bool]) -> pa.Array:
    """A column of text without what is not UTF-8, whose rows are noted in `broken`."""
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return column
    texts: list[str | None] = []
    for place, value in enumerate(column.cast(pa.large_binary()).to_pylist()):
        try:
            texts.append(None if value is None else value.decode())
        except UnicodeDecodeError:
            texts.append(None)
            broken[place] = True
    return pa.array(texts, column.type)
