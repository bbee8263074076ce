"""The content of metadata files, in bounded memory: columns, layout, rows, gaps, histograms.

Not here: any judgement of rows (filters.py).
"""

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from duckdb import DuckDBPyConnection

from evaclip_model.errors import InputError
from tasks.merge.config import SourceConfig, is_old_edition
from tasks.merge.database import explain_read_errors, open_database
from tasks.merge.merge_plan import ReadableFile, make_readable, rows_in
from tasks.merge.metadata_files import find_metadata, format_of
from tasks.merge.schema import INTEGERS, column_map, column_parts, is_number, quote_identifier

BINS = 10
MEMORY_LIMIT = "1GB"


class ColumnSummary(NamedTuple):
    """One column over the files that were read."""

    name: str
    kind: str
    """The database's type."""
    part: str | None
    """What it would be in a column map."""
    null_share: float
    histogram: tuple[int, ...]
    """Rows in ten equal bins of 0 to 1, values outside in the first and last; only scores."""


class Inspection(NamedTuple):
    files: int
    rows: int | None
    """Of all files; none when they are not parquet, whose footers tell it."""
    read_files: int
    read_rows: int
    columns: Sequence[ColumnSummary]
    problem: str | None
    """Why the files cannot be a source as they are."""
    bad_lines: Counter[str]
    """Lines of the text files that were read that are not rows, by reason."""
    first_bad_line: str
    """File, line and reason of the first."""


def inspect_files(pattern: str, read_files: int = 4) -> Inspection:
    """Look at the files of a glob or URL; the first `read_files` of them are read."""
    paths = find_metadata(pattern, "sources inspect")
    source = SourceConfig(name="inspected", files=pattern, own_rows=True)
    with (
        tempfile.TemporaryDirectory() as spill,
        open_database(Path(spill), MEMORY_LIMIT, None, paths) as connection,
    ):
        looked_at = [
            make_readable(connection, number, path, source, Path(spill))
            for number, path in enumerate(paths[:read_files])
        ]
        rows = None
        if {format_of(path, source) for path in paths} == {"parquet"}:
            rows = sum(file.rows for file in looked_at)
            for path in paths[read_files:]:
                with explain_read_errors(path):
                    rows += rows_in(connection, [path])
        first, problem, parts = looked_at[0], None, dict[str, str]()
        try:
            columns = column_map(source, first.own, first.published_as, first.is_text)
            parts = {name: part for part, name in column_parts(columns)}
        except InputError as error:
            problem = str(error)
        if is_old_edition(first.own):
            problem = (
                "the columns are those of LAION's metadata of before December 2023, which was "
                "withdrawn: as a source it needs diff_against"
            )
        for file in looked_at:
            if file.own != first.own and not (file.is_text and file.own.keys() == first.own.keys()):
                raise InputError(
                    f"{file.published_as} has other columns than {first.published_as}: inspect "
                    "them apart, and make each kind of file a source of its own"
                )
        read_rows, summaries = _summarise_columns(connection, looked_at, parts)
    return Inspection(
        *(len(paths), rows, len(looked_at), read_rows, summaries, problem),
        sum((Counter(file.flaws) for file in looked_at), Counter[str]()),
        next((file.first_flaw for file in looked_at if file.first_flaw), ""),
    )


def _summarise_columns(
    connection: DuckDBPyConnection, files: Sequence[ReadableFile], parts: Mapping[str, str]
) -> tuple[int, list[ColumnSummary]]:
    """(rows, columns) of files with the same columns."""
    table = "read_parquet($paths, union_by_name = true, hive_partitioning = false)"
    paths = {"paths": [file.path for file in files]}
    names = {quote_identifier(name): (name, kind) for name, kind in files[0].own.items()}
    counts = ", ".join(["count(*)", *(f"count({quoted})" for quoted in names)])
    summaries = []
    with explain_read_errors(files[0].published_as):
        [[rows, *there]] = connection.execute(f"SELECT {counts} FROM {table}", paths).fetchall()
        for (quoted, (name, kind)), values in zip(names.items(), there, strict=True):
            histogram = [0] * (BINS if is_number(kind) and kind not in INTEGERS else 0)
            if histogram:
                query = (
                    f"SELECT greatest(0, least({BINS - 1}, floor(value * {BINS})))::INTEGER, "
                    f"count(*) FROM (SELECT TRY_CAST({quoted} AS DOUBLE) AS value FROM {table}) "
                    "WHERE isfinite(value) GROUP BY 1"
                )
                for place, count in connection.execute(query, paths).fetchall():
                    histogram[place] = count
            gaps = 1 - values / max(rows, 1)
            summaries.append(ColumnSummary(name, kind, parts.get(name), gaps, tuple(histogram)))
    return rows, summaries
