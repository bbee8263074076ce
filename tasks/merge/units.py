"""The work of a merge in units that are done once each, in any order inside a phase, anywhere.

Not here: what they share (merge_plan.py); the selection and the totals (merge.py); the rules
(filters.py, sql/).

A unit makes a folder or file beside its place and renames it; a unit whose result is there is not
done again. So a chunk may be tried again after any failure, and chunks of one phase may run at the
same time, in processes or on machines that share the folder.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from duckdb import DuckDBPyConnection

from evaclip_model.files import replace_file, write_atomically
from tasks.merge import filters, schema, shuffle
from tasks.merge.config import MergeConfig
from tasks.merge.database import (
    copy_statement,
    execute_query,
    explain_read_errors,
    listed_urls,
    load_statement,
    open_database,
)
from tasks.merge.merge_plan import (
    MARKS,
    MergePlan,
    MetadataFile,
    make_once,
    pairs_statement,
    read_cuts,
    read_entries,
)
from tasks.tables.parquet_tables import cut_tables

MATCHES = "matches.json"
"""In the folder of a metadata file's rows: the entries of blocklists that they match."""
OUTPUT = pa.schema(
    {
        **dict.fromkeys(("uid", "source", "url", "caption", "original_id"), pa.string()),
        "similarity": pa.float64(),
        **dict.fromkeys(("width_hint", "height_hint"), pa.int64()),
        "also_in": pa.string(),
    }
)
WRITTEN: Mapping[str, Any] = {
    "compression": "zstd",
    "compression_level": 1,
    "use_dictionary": ["source", "also_in"],  # their values repeat; others' would only cost time
}

DEDUPED = ("histogram", "reasons", "survivors")
"""Statements on the table `deduped`; a histogram is made once, of what selection chooses from."""
SAMPLED_ROWS = 1_000_000
"""Rows, of those read, whose captions make entries if they stay."""


class Phase(NamedTuple):
    units: Callable[[MergePlan], int]
    make: Callable[..., None]
    """Called with connection, plan, the unit's number, and its own folder where there is one."""
    share: float
    """Of the time of a merge that does not balance, measured."""
    folder: str = ""
    """Below which every unit has one."""


class Chunk(NamedTuple):
    """Some units of one phase: what one worker does at a time. Plain values, fit to be sent."""

    plan: MergePlan
    phase: str
    numbers: tuple[int, ...]


def run_chunk(chunk: Chunk) -> Iterator[int]:
    """Do a chunk's units in a database of their own; yields every unit's number when it is done."""
    plan, phase = chunk.plan, PHASES[chunk.phase]
    spill = plan.temporary / "spill"
    with open_database(spill, plan.memory_limit, plan.threads, plan.outside_paths) as connection:
        if chunk.phase == "scan":
            fill_blocklists(connection, plan.config)
        if plan.partitions > 100:
            connection.execute(f"SET partitioned_write_max_open_files = {plan.partitions + 1}")
        for number in chunk.numbers:
            make = partial(phase.make, connection, plan, number)
            if phase.folder:
                make_once(plan.temporary / f"{phase.folder}/{number:06d}", make)
            else:
                make()
            yield number


def fill_blocklists(connection: DuckDBPyConnection, config: MergeConfig) -> None:
    """The tables that the blocklist rules ask: addresses, host names and hashes, in normal form."""
    for table, entry in filters.BLOCKED_TABLES.items():
        if paths := entry.paths(config.filters.blocklists):
            query = "SELECT unnest($urls) AS entry"
            if table == "blocked_addresses":
                distinct = "SELECT DISTINCT address AS entry FROM normalised"
                query = listed_urls(f"{distinct} WHERE address IS NOT NULL")
            entries = {"urls": filters.read_lists(paths, entry)}
            connection.execute(f"CREATE TEMP TABLE {table} AS {query}", entries)


def read_blocked(connection: DuckDBPyConnection, config: MergeConfig) -> set[str]:
    """The entries of the tables that `fill_blocklists` made."""
    return {
        entry
        for table, form in filters.BLOCKED_TABLES.items()
        if form.paths(config.filters.blocklists)
        for (entry,) in connection.execute(f"SELECT entry FROM {table}").fetchall()
    }


def _note_matches(
    judged: Iterable[pa.RecordBatch], blocked: Set[str], matched: set[str]
) -> Iterator[pa.RecordBatch]:
    """The batches without `listed`, whose entries that are `blocked` are added to `matched`."""
    for batch in judged:
        matched |= blocked & set(batch["listed"].drop_null().flatten().to_pylist())
        yield batch.drop_columns(["listed"])


def list_splits(plan: MergePlan) -> Iterator[tuple[str, str, str, dict[str, str]]]:
    """Keys of a file to be split over the partitions: (the folder that they go to, file, statement,
    SQL that it names).

    Sidecar keys of the rows of metadata, the sidecars under theirs, and the addresses that cleaned
    editions still have (numbered by edition) or earlier merges have given (numbered last).
    """
    for file in plan.files:
        for number, sidecar in plan.sidecars_of(file.source):
            parts = {"key": file.sidecar_keys[sidecar.place], "file": str(file.number)}
            place = f"sidecar_keys/{number}/{file.number:06d}"
            yield place, file.path, "partition_sidecar_keys", parts
    for number, sidecar in enumerate(plan.sidecars):
        columns = ", ".join(map(schema.quote_identifier, sidecar.config.columns))
        for at, (path, key) in enumerate(sidecar.files):
            parts = {"key": key, "columns": columns}
            yield f"sidecars/{number}/{at:06d}", path, "partition_sidecars", parts
    known = [(n, *file) for n, edition in enumerate(plan.editions) for file in edition.files]
    known += [(len(plan.editions), path, "url") for path in plan.given]
    for at, (edition, path, url) in enumerate(known):
        parts = {"url": schema.quote_identifier(url), "normalise": load_statement("normalise")}
        yield f"known/edition={edition}/{at:06d}", path, "partition_known_keys", parts


def _split_keys(connection: DuckDBPyConnection, plan: MergePlan, number: int) -> None:
    place, path, statement, parts = list(list_splits(plan))[number]
    query = copy_statement(load_statement(statement, **parts), "PARTITION_BY (part)")
    parameters = {"seed": plan.config.seed, "partitions": plan.partitions}

    def split(readable: str, folder: Path) -> None:
        execute_query(connection, query, parameters | {"path": readable, "target": str(folder)})

    _make_from_file(plan, path, plan.temporary / place, split)


def _make_from_file(
    plan: MergePlan, path: str, folder: Path, make: Callable[[str, Path], None]
) -> None:
    """Make a folder once from the file `path`; where that holds text that is not UTF-8, which the
    database refuses a whole file for, from a copy with the same rows and columns."""

    def make_folder(beside: Path) -> None:
        with explain_read_errors(path):
            try:
                return make(path, beside)
            except duckdb.Error as error:
                if not schema.is_about_encoding(error):
                    raise
        repaired = plan.temporary / "repaired" / hashlib.md5(path.encode()).hexdigest()
        make_once(repaired, lambda folder: schema.repair_text(path, folder / "rows.parquet"))
        with explain_read_errors(path):
            make(str(repaired / "rows.parquet"), beside)

    make_once(folder, make_folder)


def _join_sidecars(connection: DuckDBPyConnection, plan: MergePlan, number: int) -> None:
    sidecar, part = divmod(number, plan.partitions)
    columns = [schema.quote_identifier(name) for name in plan.sidecars[sidecar].config.columns]
    query = load_statement(
        "join_sidecars",
        columns=", ".join(columns),
        largest=", ".join(f"max({name}) AS {name}" for name in columns),
    )
    wanted = find_tables(plan, f"sidecar_keys/{sidecar}/*/part={part}")
    found = find_tables(plan, f"sidecars/{sidecar}/*/part={part}")

    def make(folder: Path) -> None:
        parameters = {"wanted": wanted, "sidecar": found, "target": str(folder)}
        execute_query(connection, copy_statement(query, "PARTITION_BY (file)"), parameters)

    if wanted and found:
        make_once(plan.temporary / f"joined/{sidecar}/{part:06d}", make)


def find_tables(plan: MergePlan, folders: str, name: str = "*") -> list[str]:
    """Parquet files of the units' folders, as the database takes them."""
    return sorted(map(str, plan.temporary.glob(f"{folders}/{name}.parquet")))


def scan_query(plan: MergePlan, file: MetadataFile) -> tuple[str, dict[str, Any]]:
    """(statement that judges every row of a file, with its sidecars' columns; its parameters)."""
    rules, added, joins = plan.config.filters, "", ""
    parameters = filters.rule_parameters(rules) | {
        "path": file.path,
        "seed": plan.config.seed,
        "keeps_hash": bool(plan.config.hash_column),
    }
    for number, sidecar in plan.sidecars_of(file.source):
        found = find_tables(plan, f"joined/{number}/*/file={file.number}")
        for name in map(schema.quote_identifier, sidecar.config.columns):
            added += f", sidecar_{number}.{name}" if found else f", NULL AS {name}"
        if found:
            parameters[f"files_{number}"] = found
            joins += (
                f"LEFT JOIN read_parquet($files_{number}, hive_partitioning = false) "
                f"AS sidecar_{number} ON sidecar_{number}.row_in_file = alone.file_row_number\n"
            )
    query = load_statement(
        "scan",
        reason=filters.reason_expression(rules),
        normalise=load_statement("normalise"),
        columns=file.columns,
        rows=load_statement("rows", added=added, joins=joins),
        listed=filters.listed_expression(),
    )
    return query, parameters


def _scan_file(connection: DuckDBPyConnection, plan: MergePlan, number: int) -> None:
    file = plan.files[number]
    blocked = read_blocked(connection, plan.config)

    def scan(path: str, folder: Path) -> None:
        columns, broken = file.columns, schema.quote_identifier(schema.BROKEN_TEXT)
        if path != file.path:
            columns = columns.replace(
                f"{schema.NOT_BROKEN} AS broken_text", f"{broken} AS broken_text"
            )
        query, parameters = scan_query(plan, file._replace(path=path, columns=columns))
        scanned = execute_query(connection, query, parameters)
        matched = set[str]()
        rows = max(shuffle.ROWS_PER_RUN, shuffle.ROWS_PER_PIECE * plan.partitions)
        judged = _note_matches(scanned.to_arrow_reader(rows), blocked, matched)
        shuffle.write_rows(judged, folder, file.source, plan.partitions)
        write_atomically(folder / MATCHES, json.dumps(sorted(matched)))

    _make_from_file(plan, file.path, rows_folder(plan, file), scan)


def rows_folder(plan: MergePlan, file: MetadataFile) -> Path:
    return plan.temporary / "rows" / f"{file.number:06d}"


def _copy_tables(
    connection: DuckDBPyConnection, folder: Path, names: Iterable[str], **parameters: Any
) -> None:
    """Write what each of these statements finds into a file of its name."""
    for name in names:
        statement = copy_statement(load_statement(name), "CODEC uncompressed")
        parameters["target"] = str(folder / f"{name}.parquet")
        execute_query(connection, statement, parameters)


def _dedupe_keys(connection: DuckDBPyConnection, plan: MergePlan, part: int, folder: Path) -> None:
    query, parameters = _partition_keys_query(connection, plan, part)
    part_keys = pa.concat_tables(
        shuffle.read_keys(rows_folder(plan, file), file.source, file.number, part, plan.partitions)
        for file in plan.files
    )
    part_keys = part_keys.append_column("alone", pa.array(shuffle.is_alone(part_keys)))
    connection.register("part_keys", part_keys)
    execute_query(connection, load_statement("dedupe", keys=query), parameters)
    connection.unregister("part_keys")
    _copy_tables(connection, folder, DEDUPED[bool(plan.config.balance) :])
    connection.execute("DROP TABLE deduped")


def _partition_keys_query(
    connection: DuckDBPyConnection, plan: MergePlan, part: int
) -> tuple[str, dict[str, Any]]:
    """(SQL of one partition's keys, each with the reason why it is `dropped`; parameters)."""
    plain = "SELECT *, NULL::VARCHAR AS dropped FROM part_keys"
    if not plan.editions and not plan.given:
        return plain, {}
    compared = [(s, n) for n, edition in enumerate(plan.editions) for s in edition.sources]
    connection.execute("CREATE OR REPLACE TEMP TABLE known (edition INTEGER, key UUID)")
    for number in range(len(plan.editions) + 1):
        if paths := find_tables(plan, f"known/edition={number}/*/part={part}"):
            connection.execute(
                "INSERT INTO known SELECT DISTINCT $edition::INTEGER, key "
                "FROM read_parquet($known, hive_partitioning = false)",
                {"edition": number, "known": paths},
            )
    return load_statement("keys"), {
        "compared": [source for source, _ in compared],
        "editions": [number for _, number in compared],
        "given": len(plan.editions),
    }


def part_of_key(plan: MergePlan, key: str | None) -> int:
    """The partition that holds a key; None: the least."""
    return int(key[:4], 16) * plan.partitions >> shuffle.BUCKET_BITS if key else 0


def kept_in(plan: MergePlan, part: int) -> str:
    """The file of the rows of a partition that stay."""
    folder = "balanced" if plan.config.balance else "kept"
    return str(plan.temporary / f"{folder}/{part:06d}/survivors.parquet")


def _read_survivors(
    plan: MergePlan, part: int, last_bucket: int = 1 << shuffle.BUCKET_BITS
) -> pa.Table:
    """The rows of a partition that deduplication leaves, numbered, with URL and caption."""
    path = plan.temporary / f"kept/{part:06d}/survivors.parquet"
    rows = pq.ParquetFile(path).read().filter(pc.field("bucket") <= last_bucket)
    for column in _read_places(plan, plan.files, part, rows, "texts", "url", "caption"):
        rows = rows.append_column(*column)
    return rows.append_column("row", pa.array(np.arange(len(rows), dtype=np.int32)))


def _list_entries(connection: DuckDBPyConnection, plan: MergePlan, _: int, folder: Path) -> None:
    wanted = plan.config.balance and plan.config.balance.entries
    if isinstance(wanted, str):
        entries = read_entries(wanted)
    else:
        last = (SAMPLED_ROWS << shuffle.BUCKET_BITS) // max(1, plan.rows)
        parts = range(min(plan.partitions, (last * plan.partitions >> shuffle.BUCKET_BITS) + 1))
        captions = (_read_survivors(plan, part, last).select(["caption"]) for part in parts)
        connection.register("captions", pa.concat_tables(captions))
        parameters = {"wanted": wanted, "marks": MARKS}
        derived = execute_query(connection, load_statement("derive_entries"), parameters)
        entries = [entry for (entry,) in derived.fetchall()]
    numbers = np.arange(len(entries), dtype=np.int32)
    connection.register(
        "listed", pa.table({"number": numbers, "entry": pa.array(entries, shuffle.TEXT)})
    )
    _copy_tables(connection, folder, ("listed", "prefixes"))


def _match_rows(connection: DuckDBPyConnection, plan: MergePlan, part: int, folder: Path) -> None:
    connection.execute(load_statement("as_written"))
    connection.register("part_rows", _read_survivors(plan, part))
    prefixes = {"prefixes": find_tables(plan, "listed/*", "prefixes")}
    [[most_words]] = connection.execute(load_statement("most_words"), prefixes).fetchall()
    execute_query(connection, pairs_statement(most_words), {"marks": MARKS, **prefixes})
    _copy_tables(connection, folder, ("matched", "found", "held"))
    connection.unregister("part_rows")


def _sum_held(connection: DuckDBPyConnection, plan: MergePlan, _: int, folder: Path) -> None:
    listed, held = find_tables(plan, "listed/*", "listed"), find_tables(plan, "matched/*", "held")
    _copy_tables(connection, folder, ["entries"], listed=listed, held=held)


def _balance_rows(connection: DuckDBPyConnection, plan: MergePlan, part: int, folder: Path) -> None:
    t = plan.config.balance and plan.config.balance.t
    parameters: dict[str, Any] = {"t": t, "entries": find_tables(plan, "counted/*", "entries")}
    for name in ("matched", "found"):
        parameters[name] = find_tables(plan, f"matched/{part:06d}", name)
    execute_query(connection, load_statement("balance"), parameters)
    _copy_tables(connection, folder, (*DEDUPED, "kept_at"), t=t)


def files_of_range(plan: MergePlan, source: int, number: int) -> list[Path]:
    """The output files of a range of the selection, in order."""
    cut = read_cuts(plan)[source]
    per_file = plan.config.rows_per_file
    digits = max(5, len(str(cut.selected // per_file)))
    first = number * plan.rows_per_range
    last = min(first + plan.rows_per_range, cut.selected)
    folder = plan.out / plan.config.sources[source].name
    return [
        folder / f"part-{start // per_file:0{digits}d}.parquet"
        for start in range(first, last, per_file)
    ]


def _write_range(connection: DuckDBPyConnection, plan: MergePlan, number: int) -> None:
    source, place = plan.list_ranges()[number]
    wanted = files_of_range(plan, source, place)
    missing = {path for path in wanted if not path.is_file()}
    if missing:
        cut = read_cuts(plan)[source]
        after, last = cut.last_keys[place - 1] if place else cut.after, cut.last_keys[place]
        (plan.out / plan.config.sources[source].name).mkdir(exist_ok=True)
        tables = (
            _choose_rows(connection, plan, source, part, after, last)
            for part in range(part_of_key(plan, after), part_of_key(plan, last) + 1)
        )
        files = cut_tables(tables, plan.config.rows_per_file)
        for path, table in zip(wanted, files, strict=True):
            if path in missing:
                temporary = plan.temporary / f"{source}-{path.name}"
                with replace_file(path, beside=temporary, sync=False) as beside:
                    pq.write_table(table.combine_chunks(), beside, **WRITTEN)


def _choose_rows(
    connection: DuckDBPyConnection,
    plan: MergePlan,
    source: int,
    part: int,
    after: str | None,
    last: str,
) -> pa.Table:
    """The rows that a range of a source takes from one partition, in order."""
    beyond = "" if after is None else "AND key::UUID > $after::UUID"
    parameters = {"kept": kept_in(plan, part), "source": source, "last": last, "after": after}
    statement = load_statement("chosen", after=beyond)
    places = execute_query(connection, statement, parameters).fetchnumpy()
    found = plan, plan.of_source(source), part, places
    columns = dict(_read_places(*found, "texts", *shuffle.TEXTS.names))
    columns |= dict(_read_places(*found, "keys", "original_id", "similarity"))
    columns["others"] = pa.chunked_array([pa.array(places["others"])])
    connection.register("chosen", pa.table(columns))
    sources = [settings.name for settings in plan.config.sources]
    made = execute_query(connection, load_statement("write"), {"names": sources}).to_arrow_table()
    connection.unregister("chosen")
    columns |= {name: made.column(name) for name in made.column_names}
    columns["source"] = pa.chunked_array([pa.repeat(sources[source], len(made))])
    hashed = [("image_hash", pa.string())] if plan.config.hash_column else []
    wanted = pa.schema([*OUTPUT, *hashed])
    return pa.table({name: columns[name] for name in wanted.names}).cast(wanted)


def _read_places(
    plan: MergePlan, files: Sequence[MetadataFile], part: int, places: Any, kind: str, *names: str
) -> Iterator[tuple[str, pa.ChunkedArray]]:
    """Columns of the rows of a partition that `places` names by `file` and `place` in them."""
    tables = [
        shuffle.read_rows(rows_folder(plan, file), kind, part, plan.partitions).select(names)
        for file in files
    ]
    begins = np.cumsum([0, *map(len, tables)])[:-1]
    indices = begins[np.asarray(places["file"]) - files[0].number] + np.asarray(places["place"])
    # Chunks are joined first, as their rows lie anywhere.
    rows = pa.concat_tables(tables).combine_chunks().take(pa.array(indices))
    yield from zip(names, rows.columns, strict=True)


PHASES: Mapping[str, Phase] = {
    "split_keys": Phase(lambda plan: len(list(list_splits(plan))), _split_keys, 0.0),
    "join_sidecars": Phase(lambda plan: len(plan.sidecars) * plan.partitions, _join_sidecars, 0.0),
    "scan": Phase(lambda plan: len(plan.files), _scan_file, 0.5),
    "dedupe": Phase(lambda plan: plan.partitions, _dedupe_keys, 0.2, "kept"),
    "list": Phase(lambda plan: bool(plan.config.balance), _list_entries, 0.0, "listed"),
    "match": Phase(
        lambda plan: bool(plan.config.balance) * plan.partitions, _match_rows, 2.0, "matched"
    ),
    "count": Phase(lambda plan: bool(plan.config.balance), _sum_held, 0.0, "counted"),
    "balance": Phase(
        lambda plan: bool(plan.config.balance) * plan.partitions, _balance_rows, 0.6, "balanced"
    ),
    "write": Phase(lambda plan: len(plan.list_ranges()), _write_range, 0.3),
}
"""In order: every phase reads what the ones before have made."""
