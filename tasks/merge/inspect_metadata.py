"""The content of metadata files: columns, layout, rows, shares of missing values, histograms.

Covers: the facts one needs before naming files as a source, read in bounded memory.
Not here: printing them; any judgement of rows (filters.py).
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from duckdb import DuckDBPyConnection

from evaclip_model.errors import InputError
from tasks.merge.config import ColumnMap, SourceConfig, is_old_edition, why_refused
from tasks.merge.database import explain_read_errors, open_database
from tasks.merge.merge_plan import read_columns, rows_in
from tasks.merge.metadata_files import READERS, Format, find_metadata, format_of
from tasks.merge.schema import PublishedColumns, column_map, is_number, quote_identifier
from tasks.tables.text_tables import read_text_table

BINS = 10
MEMORY_LIMIT = "1GB"


@dataclass(frozen=True)
class ColumnSummary:
    """One column over the files that were read."""

    name: str
    kind: str
    """The database's type."""
    part: str | None
    """What it would be in a column map."""
    null_share: float
    histogram: tuple[int, ...]
    """Rows in ten equal bins of 0 to 1, values outside in the first and last; only scores."""


@dataclass(frozen=True)
class Inspection:
    """The content of the files of one pattern."""

    files: int
    rows: int | None
    """Of all files; none when they are not parquet, whose footers tell it."""
    read_files: int
    """How many were read for the columns."""
    read_rows: int
    columns: tuple[ColumnSummary, ...]
    problem: str | None
    """Why the files cannot be a source as they are."""
    bad_lines: Counter[str] = field(default_factory=Counter)
    """Lines of the text files that were read that are not rows, by reason."""
    first_bad_line: str = ""
    """File, line and reason of the first."""


def inspect_files(pattern: str, read_files: int = 4) -> Inspection:
    """Look at the files of a glob or URL; the first `read_files` of them are read.

    Raises:
        InputError: nothing matches, or a file cannot be read.
    """
    refused = why_refused(pattern)
    if refused:
        raise InputError(refused)
    paths = find_metadata(pattern, "sources inspect")
    source = SourceConfig(name="inspected", files=pattern, own_rows=True)
    kinds = {path: format_of(path, source) for path in paths}
    with (
        tempfile.TemporaryDirectory() as spill,
        open_database(Path(spill), MEMORY_LIMIT, None, paths) as connection,
    ):
        rows = None
        if set(kinds.values()) == {"parquet"}:
            rows = 0
            for path in paths:
                with explain_read_errors(path):
                    rows += rows_in(connection, [path])
        first, problem, columns = paths[0], None, None
        published = read_columns(connection, first, kinds[first])
        try:
            columns = column_map(source, published, first)
        except InputError as error:
            problem = str(error)
        if is_old_edition(published):
            problem = (
                "the columns are those of LAION's metadata of before December 2023, which was "
                "withdrawn: as a source it needs diff_against"
            )
        counted = []
        for path in paths[:read_files]:
            if read_columns(connection, path, kinds[path]) != published:
                raise InputError(
                    f"{path} has other columns than {first}: inspect them apart, and make each "
                    "kind of file a source of its own"
                )
            counted.append(_count_values(connection, path, READERS[kinds[path]], published))
    bad_lines, first_bad_line = _bad_lines(paths[:read_files], kinds)
    read_rows = sum(count[0] for count in counted)
    found = tuple(
        ColumnSummary(
            name,
            kind,
            _part_of(name, columns),
            1 - sum(count[1][name] for count in counted) / max(read_rows, 1),
            tuple(map(sum, zip(*(count[2].get(name, ()) for count in counted), strict=True))),
        )
        for name, kind in published.items()
    )
    return Inspection(
        *(len(paths), rows, len(counted), read_rows, found, problem, bad_lines, first_bad_line)
    )


def _bad_lines(paths: Sequence[str], kinds: Mapping[str, Format]) -> tuple[Counter[str], str]:
    """Lines that a merge would leave out, by reason, and the first of them."""
    reasons, first = Counter[str](), ""
    for path in paths:
        kind = kinds[path]
        for row in read_text_table(path, kind) if kind != "parquet" else ():
            if row.flaw is not None:
                reasons[row.flaw] += 1
                first = first or f"{path}, line {row.line}: {row.flaw}"
    return reasons, first


def _count_values(
    connection: DuckDBPyConnection, path: str, reader: str, published: PublishedColumns
) -> tuple[int, dict[str, int], dict[str, list[int]]]:
    """(rows, values that are there by column, histogram by score column) of one file."""
    scores = [name for name, kind in published.items() if is_number(kind, whole=False)]
    values = [f"count({quote_identifier(name)})" for name in published]
    bins = [
        f"count(*) FILTER (floor({quote_identifier(name)} * {BINS}) {_comparison_at(place)} "
        f"{place})"
        for name in scores
        for place in range(BINS)
    ]
    with explain_read_errors(path, "metadata"):
        [found] = connection.execute(
            f"SELECT count(*), {', '.join([*values, *bins])} FROM {reader}", {"path": path}
        ).fetchall()
    rows, counts = int(found[0]), [int(value) for value in found[1:]]
    there, places = counts[: len(published)], counts[len(published) :]
    histograms = {
        name: places[start * BINS : (start + 1) * BINS] for start, name in enumerate(scores)
    }
    return rows, dict(zip(published, there, strict=True)), histograms


def _comparison_at(place: int) -> str:
    """Shares of the bins; the first and the last bin are open to one side."""
    return {0: "<=", BINS - 1: ">="}.get(place, "=")


def _part_of(name: str, columns: ColumnMap | None) -> str | None:
    if columns is None:
        return None
    for part, value in columns.model_dump().items():
        if name == value or (isinstance(value, tuple) and name in value):
            return str(part)
    return None
