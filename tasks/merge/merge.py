"""Merge metadata collections: filter, normalise, deduplicate, select, write.

Covers: the phases in order, what makes them restartable, the selection, and the totals.
Not here: the rules (filters.py, sql/), the meaning of columns (schema.py), the settings
(config.py), one phase's units (units.py), another engine (spark.py).

Memory depends on the size of a partition, never on the number of rows:

    ask     metadata file      -> sidecar keys of its rows, split over partitions
    tell    sidecar file       -> its keys and columns, split over partitions
    answer  partition          -> the sidecar's columns for the rows of every file
    know    cleaned edition    -> keys of the addresses it still has, split over partitions
    scan    metadata file      -> passing rows with 16-byte keys, split over partitions; reasons
    dedupe  partition          -> from its narrow columns: the row that stays of every address
    cut     source             -> exact keys where its selection, and each range of it, ends
    write   range              -> sorted output files

Key = md5(seed, address): a partition is a range of keys, and the smallest keys of a source are
selected, so a larger count selects the same rows and more, and hosts are mixed along the output.
Every metadata file is read once, every passing row written once and read about twice before it is
in its output file. Everything temporary is under `out/_tmp`.
"""

from __future__ import annotations

import json
import shutil
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from duckdb import DuckDBPyConnection

from evaclip_model.errors import InputError
from tasks.artifact import Made, write_atomically
from tasks.merge.config import ColumnMap, MergeConfig, SidecarConfig, SourceConfig
from tasks.merge.database import database, reading, statement
from tasks.merge.filters import REASONS
from tasks.merge.schema import Published, column_map, quoted, select_list
from tasks.merge.sources import READERS, find_metadata, format_of, identity
from tasks.merge.spark import spark_runner
from tasks.merge.units import (
    BUCKET_BITS,
    PHASES,
    Chunk,
    Cut,
    Edition,
    MetadataFile,
    Plan,
    Sidecar,
    files_of_range,
    kept_in,
    once,
    read_cuts,
    run_chunk,
    text_of,
)
from tasks.progress import Report, silent

Files = Mapping[str, Sequence[Path | str]]
"""Source name -> its files or URLs, in order."""
Runner = Callable[[Sequence[Chunk]], Iterator[int]]
"""Does the chunks of one phase, here or elsewhere; yields the number of every unit that is done."""

REPORT = "report.json"
REMOVED = "_tmp.removed"
ROWS_PER_PARTITION = 2_000_000
BUCKETS = 1 << BUCKET_BITS
MOST_CHUNKS = 500
"""Of one phase: more tasks than this only cost the orchestrator."""


def one_after_another(chunks: Sequence[Chunk]) -> Iterator[int]:
    """The `Runner` of one process: the database's own threads do the work side by side."""
    for chunk in chunks:
        yield from run_chunk(chunk)


def merge_sources(
    config: MergeConfig,
    files: Files,
    out: Path,
    report: Report = silent,
    *,
    threads: int | None = None,
    run: Runner = one_after_another,
    chunks: int = 1,
    memory_limit: str | None = None,
) -> Made:
    """Merge `files` into `out/<source>/part-*.parquet` and `out/report.json`.

    `run`, `chunks` (into how many each phase is cut, at most 500), and `threads` and `memory_limit`
    of one chunk's database (none = every core, the config's limit) never change the result.
    Columns of the output: uid (md5 of address and caption, hex), source, url, caption, original_id,
    similarity, width_hint, height_hint, and also_in (other sources that have the address, with
    commas); rows in selection order, `rows_per_file` in every file but a source's last.

    Raises:
        InputError: a source has no file, a file cannot be read or lacks a column, or a source gives
            no row.
    """
    _forget_other_work(out, config, files)
    plan = make_plan(config, files, out, threads, memory_limit or config.memory_limit)
    if config.engine == "spark":
        with spark_runner() as run_on_spark:
            _run_phases(plan, run_on_spark, MOST_CHUNKS, report)
    else:
        _run_phases(plan, run, chunks, report)
    with database(plan.temporary / "spill", plan.memory_limit, threads) as connection:
        cuts = read_cuts(plan)
        totals = _totals(connection, plan, cuts)
        parts = [path for range_ in plan.ranges() for path in files_of_range(plan, *range_)]
        written = _rows_in(connection, text_of(parts))
    if written != sum(cut.selected for cut in cuts):
        raise RuntimeError(f"{sum(cut.selected for cut in cuts)} rows selected, {written} written")
    write_atomically(plan.temporary / REPORT, json.dumps(totals, indent=1) + "\n")
    (plan.temporary / REPORT).replace(out / REPORT)
    # a half-removed folder of units would look finished, so it goes out of their sight first
    plan.temporary.rename(out / REMOVED)
    shutil.rmtree(out / REMOVED)
    report(plan.rows, plan.rows, "merged")
    return Made(_flat_counts(totals), (*parts, out / REPORT))


def _run_phases(plan: Plan, run: Runner, chunks: int, report: Report) -> None:
    for name in PHASES:
        if name == "write":
            save_cuts(plan)
        before = sum(PHASES[other].share for other in list(PHASES)[: list(PHASES).index(name)])
        units = PHASES[name].count(plan)
        detail = f"{name}: %d of {units}"
        report(round(before * plan.rows), plan.rows, detail % 0)
        for done, _ in enumerate(run(_in_chunks(plan, name, units, chunks)), 1):
            share = before + PHASES[name].share * done / units
            report(round(share * plan.rows), plan.rows, detail % done)


def _in_chunks(plan: Plan, phase: str, units: int, chunks: int) -> list[Chunk]:
    """Every n-th unit each, so that large files that lie together are shared out."""
    apart = min(chunks, units, MOST_CHUNKS)
    return [Chunk(plan, phase, tuple(range(first, units, apart))) for first in range(apart)]


def _forget_other_work(out: Path, config: MergeConfig, files: Files) -> None:
    """Clear what a killed run left when it was made from other files or settings."""
    shutil.rmtree(out / REMOVED, ignore_errors=True)
    plan = out / "_tmp" / "plan.json"
    wanted = json.dumps(
        {
            "config": config.model_dump(mode="json", exclude={"memory_limit"}),
            "files": {name: [identity(str(path)) for path in files[name]] for name in files},
        },
        sort_keys=True,
    )
    if plan.is_file() and plan.read_text() == wanted:
        return
    for leaving in (out / "_tmp", *(out / source.name for source in config.sources)):
        shutil.rmtree(leaving, ignore_errors=True)
    plan.parent.mkdir(parents=True)
    write_atomically(plan, wanted)


def make_plan(
    config: MergeConfig, files: Files, out: Path, threads: int | None, memory_limit: str
) -> Plan:
    """Schema and row count of every file, before any of the long work.

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
    outside += [path for sidecar in sidecars for path in sidecar.paths] + compared
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
            if not any(file.rows for file in found if file.source == number):
                raise InputError(
                    f"source '{source.name}' is empty: '{source.files}' has "
                    f"{len(files[source.name])} file(s) without a single row; put its metadata "
                    "there or remove the source"
                )
        editions = _editions(connection, config)
    rows = sum(file.rows for file in found)
    partitions = config.partitions or -(-rows // ROWS_PER_PARTITION)
    return Plan(config, out, tuple(found), sidecars, editions, partitions, threads, memory_limit)


def _inspect(
    connection: DuckDBPyConnection,
    number: int,
    path: str,
    source_number: int,
    source: SourceConfig,
    extra: Published,
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
        rows = _rows_in(connection, [path])
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


def _sidecar_key(sidecar: SidecarConfig, columns: ColumnMap, published: Published) -> str:
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


def dropped_rows(connection: DuckDBPyConnection, plan: Plan) -> list[Counter[str]]:
    """Dropped rows of every source by reason, before selection."""
    counts = [Counter[str]() for _ in plan.config.sources]
    rejected = sorted(plan.temporary.glob("rows/*/part=-1/*.parquet"))
    duplicates = sorted(plan.temporary.glob("kept/*/reasons.parquet"))
    for paths, number in ((rejected, "count(*)"), (duplicates, "sum(rows)")):
        if paths:
            for source, reason, rows in connection.execute(
                f"SELECT source, reason, {number} FROM read_parquet($paths, "
                "hive_partitioning = false) WHERE reason IS NOT NULL GROUP BY ALL",
                {"paths": text_of(paths)},
            ).fetchall():
                counts[source][reason] += int(rows)
    return counts


def save_cuts(plan: Plan) -> None:
    """Select: save where each source's selection ends in key order, and the ranges it has.

    Raises:
        InputError: a source has no row left.
    """
    saved = plan.temporary / "cuts.json"
    if saved.is_file():
        return
    with database(plan.temporary / "spill", plan.memory_limit, plan.threads) as connection:
        for source, reasons in enumerate(dropped_rows(connection, plan)):
            _check_something_is_left(plan, source, reasons)
        cuts = [_cut_source(connection, plan, source) for source in range(len(plan.config.sources))]
    write_atomically(saved, json.dumps([[cut.selected, cut.after, cut.last_keys] for cut in cuts]))


def _check_something_is_left(plan: Plan, source: int, reasons: Counter[str]) -> None:
    settings = plan.config.sources[source]
    rows = sum(file.rows for file in plan.of_source(source))
    survivors = rows - reasons.total()
    if survivors == 0:
        main, number = reasons.most_common(1)[0]
        raise InputError(
            f"source '{settings.name}' has no row left of {rows}: most ({number}) were "
            f"dropped as {main}; check [merge.filters] and the source's columns"
        )
    if survivors <= settings.skip_count:
        raise InputError(
            f"source '{settings.name}' has no row left: {survivors} pass, and skip_count = "
            f"{settings.skip_count} leaves them out; there is nothing to fill back with"
        )


def _cut_source(connection: DuckDBPyConnection, plan: Plan, source: int) -> Cut:
    histogram = [0] * BUCKETS
    for bucket, rows in connection.execute(
        "SELECT bucket, sum(rows) FROM read_parquet($paths, hive_partitioning = false) "
        "WHERE source = $source GROUP BY bucket",
        {
            "paths": text_of(sorted(plan.temporary.glob("kept/*/histogram.parquet"))),
            "source": source,
        },
    ).fetchall():
        histogram[bucket] = int(rows)

    def keys_at(buckets: Sequence[int], places: Sequence[int]) -> list[str]:
        parts = sorted({bucket * plan.partitions >> BUCKET_BITS for bucket in buckets})
        found = connection.execute(
            statement("cut"),
            {
                "buckets": list(buckets),
                "places": list(places),
                "paths": kept_in(plan, parts),
                "source": source,
            },
        ).fetchall()
        return [key for (key,) in found]

    return cut_at(plan, source, histogram, keys_at)


def cut_at(
    plan: Plan,
    source: int,
    histogram: Sequence[int],
    keys_at: Callable[[Sequence[int], Sequence[int]], list[str]],
) -> Cut:
    """The cut of a source: how many of its rows are selected, and the keys that bound them.

    Args:
        histogram: survivors by the first 16 bits of their key.
        keys_at: (buckets, places in them from 1) -> the keys there, in order.
    """
    settings = plan.config.sources[source]
    up_to = list(accumulate(histogram))
    first = settings.skip_count
    left = up_to[-1] - first
    selected = left if settings.wanted_rows is None else min(settings.wanted_rows, left)
    steps = [*range(plan.rows_per_range, selected, plan.rows_per_range), selected]
    ends = [*([first] if first else []), *(first + step for step in steps)]
    buckets = [bisect_left(up_to, end) for end in ends]
    places = [
        end - (up_to[bucket] - histogram[bucket]) for end, bucket in zip(ends, buckets, strict=True)
    ]
    keys = keys_at(buckets, places)
    if len(keys) != len(ends):
        raise RuntimeError(f"{len(ends)} cuts wanted, {len(keys)} found")
    return Cut(selected, keys[0] if first else None, tuple(keys[1 if first else 0 :]))


def _totals(connection: DuckDBPyConnection, plan: Plan, cuts: Sequence[Cut]) -> dict[str, Any]:
    sources: list[dict[str, Any]] = []
    overlaps = _overlaps(connection, plan)
    for number, (settings, dropped) in enumerate(
        zip(plan.config.sources, dropped_rows(connection, plan), strict=True)
    ):
        read = sum(file.rows for file in plan.of_source(number))
        selected = cuts[number].selected
        survivors = _survivors(connection, plan, number)
        given = min(settings.skip_count, survivors)
        reasons = dropped + Counter(given_before=given, not_selected=survivors - given - selected)
        if reasons.total() + selected != read or not set(reasons) <= set(REASONS):
            raise RuntimeError(
                f"source '{settings.name}': {selected} selected and {reasons.total()} dropped "
                f"({dict(reasons)}) are not the {read} rows read"
            )
        sources.append(
            {
                "name": settings.name,
                "files": len(plan.of_source(number)),
                "target_count": settings.target_count,
                "rows_read": read,
                "selected": selected,
                "dropped": {reason: reasons[reason] for reason in REASONS},
                "also_in": overlaps[number],
            }
        )
    total = {
        "rows_read": sum(source["rows_read"] for source in sources),
        "selected": sum(source["selected"] for source in sources),
        "dropped": {
            reason: sum(source["dropped"][reason] for source in sources) for reason in REASONS
        },
    }
    return {"total": total, "sources": sources}


def _survivors(connection: DuckDBPyConnection, plan: Plan, source: int) -> int:
    found = connection.execute(
        "SELECT coalesce(sum(rows), 0) FROM read_parquet($paths, hive_partitioning = false) "
        "WHERE source = $source",
        {
            "paths": text_of(sorted(plan.temporary.glob("kept/*/histogram.parquet"))),
            "source": source,
        },
    ).fetchall()
    return int(found[0][0])


def _overlaps(connection: DuckDBPyConnection, plan: Plan) -> list[dict[str, int]]:
    """Of every source: how many of its surviving addresses each later source has too."""
    counts = [Counter[str]() for _ in plan.config.sources]
    for source, others, rows in connection.execute(
        "SELECT source, others, sum(rows) FROM read_parquet($paths, hive_partitioning = false) "
        "WHERE reason IS NULL GROUP BY ALL",
        {"paths": text_of(sorted(plan.temporary.glob("kept/*/reasons.parquet")))},
    ).fetchall():
        for number, other in enumerate(plan.config.sources):
            if others >> number & 1:
                counts[source][other.name] += int(rows)
    return [{name: count[name] for name in sorted(count)} for count in counts]


def _flat_counts(totals: Mapping[str, Any]) -> dict[str, int]:
    """Counts of the manifest: totals, then every source's, without the buckets that are empty."""
    counts: dict[str, int] = {}
    for prefix, part in [
        ("", totals["total"]),
        *((f"{source['name']}.", source) for source in totals["sources"]),
    ]:
        counts[f"{prefix}rows_read"] = part["rows_read"]
        counts[f"{prefix}selected"] = part["selected"]
        counts[f"{prefix}dropped"] = sum(part["dropped"].values())
        for reason, rows in part["dropped"].items():
            if rows:
                counts[f"{prefix}dropped.{reason}"] = rows
    return counts


def _rows_in(connection: DuckDBPyConnection, paths: Sequence[str]) -> int:
    found = connection.execute(
        "SELECT sum(num_rows) FROM parquet_file_metadata($paths)", {"paths": list(paths)}
    ).fetchall()
    return int(found[0][0])
