"""Making the plan of a merge: what every file holds, before any of the long work.

Covers: schema, column map and row count of every metadata file, sidecar and cleaned edition; text
files turned into parquet; how many partitions there are.
Not here: the plan itself (merge_plan.py), the work (units.py), the meaning of columns (schema.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from duckdb import DuckDBPyConnection

from evaclip_model.errors import InputError
from tasks.merge.config import ColumnMap, MergeConfig, SidecarConfig, SourceConfig
from tasks.merge.database import database, reading
from tasks.merge.merge_plan import Edition, MergePlan, MetadataFile, Sidecar, once
from tasks.merge.metadata_files import READERS, find_metadata, format_of
from tasks.merge.schema import PublishedColumns, column_map, quoted, select_list

Files = Mapping[str, Sequence[Path | str]]
"""Source name -> its files or URLs, in order."""

ROWS_PER_PARTITION = 250_000
"""What a partition holds, of all sources together: its rows stay in the processor's cache while
they are put in order, and four times as many take a third more CPU-seconds."""
MOST_PARTITIONS = 2_048
"""More than this and the pieces of a run get so small that their headers cost more than they."""


def make_plan(
    config: MergeConfig,
    files: Files,
    out: Path,
    threads: int | None,
    memory_limit: str,
    given: Sequence[str] = (),
) -> MergePlan:
    """Schema and row count of every file, before any of the long work.

    With files of what was `given` before a source may be empty: there may be nothing new.

    Raises:
        InputError: a file cannot be read, lacks a column, or is withdrawn; a source is empty.
    """
    sidecars = tuple(
        Sidecar(number, place, sidecar, tuple(find_metadata(sidecar.files, f"sidecar of {name}")))
        for number, (name, source) in enumerate((s.name, s) for s in config.sources)
        for place, sidecar in enumerate(source.sidecars)
    )
    outside = [str(path) for paths in files.values() for path in paths]
    compared = [source.diff_against for source in config.sources if source.diff_against]
    outside += [path for sidecar in sidecars for path in sidecar.paths] + compared + list(given)
    spill = out / "_tmp" / "spill"
    with database(spill, memory_limit, threads, outside) as connection:
        added = {
            (sidecar.source, sidecar.place): _sidecar_columns(connection, config, sidecar)
            for sidecar in sidecars
        }
        found: list[MetadataFile] = []
        for number, source in enumerate(config.sources):
            if not files.get(source.name):
                raise InputError(f"source '{source.name}': no file matches '{source.files}'")
            extra = {
                name: kind
                for (at, _), columns in added.items()
                if at == number
                for name, kind in columns.items()
            }
            for path in map(str, files[source.name]):
                found.append(
                    _inspect(connection, len(found), path, number, source, extra, out / "_tmp")
                )
            if not given and not any(file.rows for file in found if file.source == number):
                raise InputError(
                    f"source '{source.name}' is empty: '{source.files}' has "
                    f"{len(files[source.name])} file(s) without a single row; put its metadata "
                    "there or remove the source"
                )
        editions = _editions(connection, config)
    rows = sum(file.rows for file in found)
    partitions = config.partitions or min(MOST_PARTITIONS, -(-rows // ROWS_PER_PARTITION))
    return MergePlan(
        *(config, out, tuple(found), sidecars, editions, max(1, partitions)),
        *(threads, memory_limit, tuple(given)),
    )


def _inspect(
    connection: DuckDBPyConnection,
    number: int,
    path: str,
    source_number: int,
    source: SourceConfig,
    extra: PublishedColumns,
    temporary: Path,
) -> MetadataFile:
    kind = format_of(path, source)
    if kind != "parquet":
        converted = temporary / "converted" / f"{number:06d}"
        with reading(path, kind):
            once(converted, lambda folder: _convert(connection, READERS[kind], path, folder))
        path = str(converted / "rows.parquet")
    own = _published(connection, path)
    with reading(path):
        rows = rows_in(connection, [path])
    published = {**own, **extra}
    columns = column_map(source, published, path)
    keys = tuple(_sidecar_key(sidecar, columns, own) for sidecar in source.sidecars)
    select = select_list(columns, published)
    return MetadataFile(number, path, source_number, select, keys, rows)


def _convert(connection: DuckDBPyConnection, reader: str, path: str, folder: Path) -> None:
    """Rows of a text file as parquet, in order: rows are told apart by their numbers."""
    connection.execute("SET preserve_insertion_order = true")
    connection.execute(
        f"COPY (SELECT * FROM {reader}) TO $target (FORMAT parquet)",
        {"path": path, "target": str(folder / "rows.parquet")},
    )
    connection.execute("SET preserve_insertion_order = false")


def _published(connection: DuckDBPyConnection, path: str) -> dict[str, str]:
    with reading(path):
        description = connection.execute(
            f"DESCRIBE SELECT * FROM {READERS['parquet']}", {"path": path}
        ).fetchall()
    return {name: kind for name, kind, *_ in description}


def _sidecar_columns(
    connection: DuckDBPyConnection, config: MergeConfig, sidecar: Sidecar
) -> dict[str, str]:
    source = config.sources[sidecar.source].name
    published = _published(connection, sidecar.paths[0])
    for path in sidecar.paths:
        columns = _published(connection, path)
        for name in (sidecar.config.key, *sidecar.config.columns):
            if name not in columns:
                raise InputError(
                    f"{path}: sidecar of source '{source}' has no column '{name}'; "
                    f"its columns are {', '.join(columns)}"
                )
    return {name: published[name] for name in sidecar.config.columns}


def _sidecar_key(sidecar: SidecarConfig, columns: ColumnMap, published: PublishedColumns) -> str:
    """SQL of a row's key in a sidecar."""
    if sidecar.on == "url":
        return quoted(columns.url)
    if sidecar.on == "id":
        return quoted(columns.id) if columns.id else "NULL"
    if "hash" in published:
        return quoted("hash")
    text = " || ".join(f"coalesce({quoted(name)}, '')" for name in (columns.url, columns.caption))
    return f"laion_hash({text})"


def _editions(connection: DuckDBPyConnection, config: MergeConfig) -> tuple[Edition, ...]:
    compared: dict[str, list[int]] = {}
    for number, source in enumerate(config.sources):
        if source.diff_against:
            compared.setdefault(source.diff_against, []).append(number)
    editions = []
    for pattern, sources in compared.items():
        cleaned = SourceConfig(name="cleaned", files=pattern)
        paths = find_metadata(pattern, "diff_against")
        columns = [column_map(cleaned, _published(connection, path), path) for path in paths]
        urls = [column.url for column in columns]
        editions.append(Edition(tuple(sources), tuple(zip(paths, urls, strict=True))))
    return tuple(editions)


def rows_in(connection: DuckDBPyConnection, paths: Sequence[str]) -> int:
    """Rows of parquet files, as their footers tell."""
    found = connection.execute(
        "SELECT sum(num_rows) FROM parquet_file_metadata($paths)", {"paths": list(paths)}
    ).fetchall()
    return int(found[0][0])
