"""Rows of parquet files here or at a URL: texts as bytes, so that one which is not UTF-8 costs
itself alone. Not here: what columns mean."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from evaclip_model.errors import InputError, shorten_error
from evaclip_model.reading.urls import open_binary


def parquet_schema(file: str, where: str) -> pa.Schema:
    """Columns of a file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with open_binary(file) as raw:
            return pq.read_schema(raw)
    except Exception as error:  # every protocol has its own kinds
        said = shorten_error(error)
        raise InputError(f"{where}: {file} cannot be read as parquet ({said})") from None


def read_parquet_rows(
    file: str, columns: Sequence[str], rows_at_once: int
) -> Iterator[tuple[Any, ...]]:
    """Yield the values of `columns`, row by row.

    Raises:
        InputError: the file cannot be read to its end.
    """
    number = 0
    try:
        with open_binary(file) as raw:
            wanted = list(dict.fromkeys(columns))
            for batch in pq.ParquetFile(raw).iter_batches(rows_at_once, columns=wanted):
                values = [
                    batch.column(name).cast(_as_bytes(batch.column(name).type)).to_pylist()
                    for name in columns
                ]
                for row in zip(*values, strict=True):
                    yield row
                    number += 1
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise InputError(
            f"{file} cannot be read behind row {number} ({shorten_error(error)}): fetch it again "
            "or take it out of 'files'"
        ) from None


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
