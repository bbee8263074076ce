"""Rows of parquet files here or at a URL: texts as bytes, so that one which is not UTF-8 costs
itself alone; and tables of a size. Not here: what columns mean."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from evaclip_model.errors import InputError, shorten_error
from evaclip_model.reading.urls import open_binary


def parquet_schema(file: str, where: str) -> pa.Schema:
    try:
        with open_binary(file) as raw:
            return pq.read_schema(raw)
    except Exception as error:  # every protocol has its own kinds
        said = shorten_error(error)
        raise InputError(f"{where}: {file} cannot be read as parquet ({said})") from None


def read_parquet_rows(
    file: str, columns: Sequence[str], rows_at_once: int
) -> Iterator[tuple[Any, ...]]:
    number = 0
    try:
        with open_binary(file) as raw:
            wanted = list(dict.fromkeys(columns))
            parquet = pq.ParquetFile(raw, buffer_size=1 << 20)  # not a group of rows at once
            groups = range(parquet.num_row_groups)  # each iteration holds all that it has read
            for batch in chain.from_iterable(
                parquet.iter_batches(rows_at_once, [group], wanted) for group in groups
            ):
                found = map(batch.column, columns)
                values = [one.cast(_as_bytes(one.type)).to_pylist() for one in found]
                for row in zip(*values, strict=True):
                    yield row
                    number += 1
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise InputError(
            f"{file} cannot be read behind row {number} ({shorten_error(error)}): fetch it again "
            "or take it out of 'files'"
        ) from None


def cut_tables(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Yield the rows of tables of one schema in tables of `rows`, the last one shorter."""
    waiting: pa.Table | None = None
    for table in tables:
        waiting = table if waiting is None else pa.concat_tables([waiting, table])
        while len(waiting) >= rows:
            yield waiting.slice(0, rows)
            waiting = waiting.slice(rows)
    if waiting is not None and len(waiting):
        yield waiting


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_dictionary(kind):
        return _as_bytes(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(_as_bytes(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _as_bytes(field.type)) for field in kind])
    return kind
