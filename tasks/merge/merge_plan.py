"""The plan that all units of a merge share, and making it: what every metadata file, sidecar and
cleaned edition holds, before any of the long work. Text files become parquet here.
Also the entries of a merge that balances, and what finds them in captions (pairs.sql); and the
content of metadata files for a person, in bounded memory: columns, rows, gaps.

Not here: the units (units.py), the meaning of columns (schema.py).
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from duckdb import DuckDBPyConnection

from evaclip_model.errors import InputError, shorten_error
from evaclip_model.files import write_atomically
from evaclip_model.reading.urls import read_text
from tasks.merge import schema
from tasks.merge.config import MOST_ENTRIES, ColumnMap, MergeConfig, SidecarConfig, SourceConfig
from tasks.merge.database import explain_read_errors, load_statement, open_database
from tasks.merge.metadata_files import find_metadata, format_of, outside_files
from tasks.tables.text_tables import TextFormat, column_names, read_text_table

ROWS_PER_RANGE = 1_000_000
Files = Mapping[str, Sequence[Path | str]]
"""Source name -> its files or URLs, in order."""
ROWS = "rows.parquet"
"""What a text file becomes."""
_NUMBER = r"^\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$"
ROWS_PER_PARTITION = 250_000
"""What a partition holds, of all sources together: its rows stay in the processor's cache while
they are put in order, and four times as many take a third more CPU-seconds."""
MOST_PARTITIONS = 2_048
"""More than this and the pieces of a run get so small that their headers cost more than they."""
MARKS = "[,.;:?!`]"
MOST_CHARS = 300


class ReadableFile(NamedTuple):
    """One input file as parquet."""

    path: str
    """The parquet file that is read: the published one, or made from it."""
    published_as: str
    own: dict[str, str]
    """Its columns and their types; of a text file, VARCHAR or DOUBLE by what most values are."""
    is_text: bool
    rows: int
    flaws: dict[str, int]
    """Lines of the text file that are not rows, by reason."""
    first_flaw: str = ""
    """The first of them, as the user's own file has it, and what is wrong with it."""


class MetadataFile(NamedTuple):
    """One input file: what to read of it, and how many rows it must give."""

    number: int
    """Among all files of the merge."""
    path: str
    source: int
    """Place in the config."""
    columns: str
    """Select list that gives it the common columns."""
    sidecar_keys: tuple[str, ...]
    """SQL of its key for each sidecar of its source."""
    rows: int
    bad_lines: int
    first_bad_line: str


class Sidecar(NamedTuple):
    source: int
    place: int
    """Among the source's sidecars."""
    config: SidecarConfig
    files: tuple[tuple[str, str], ...]
    """(path, SQL of its key)."""


class Edition(NamedTuple):
    """A cleaned edition that the old copies in `sources` are compared with."""

    sources: tuple[int, ...]
    files: tuple[tuple[str, str], ...]
    """(path, name of its URL column)."""


@dataclass(frozen=True)
class MergePlan:
    """Everything the units share; nothing of it changes while they run."""

    config: MergeConfig
    out: Path
    files: tuple[MetadataFile, ...]
    sidecars: tuple[Sidecar, ...]
    editions: tuple[Edition, ...]
    partitions: int
    threads: int | None
    memory_limit: str
    """Memory of the database of one chunk."""
    given: tuple[str, ...] = ()
    """Files of rows that earlier merges selected: their addresses are not selected again."""

    @property
    def temporary(self) -> Path:
        return self.out / "_tmp"

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    @property
    def rows_per_range(self) -> int:
        """A multiple of the rows of a file, so that every file lies in one range."""
        return max(1, ROWS_PER_RANGE // self.config.rows_per_file) * self.config.rows_per_file

    @property
    def outside_paths(self) -> list[str]:
        beside = [path for one in self.sidecars for path, _ in one.files]
        beside += [path for one in self.editions for path, _ in one.files]
        return [*(file.path for file in self.files), *beside, *self.given]

    def of_source(self, source: int) -> list[MetadataFile]:
        return [file for file in self.files if file.source == source]

    def sidecars_of(self, source: int) -> list[tuple[int, Sidecar]]:
        return [(n, sidecar) for n, sidecar in enumerate(self.sidecars) if sidecar.source == source]

    def list_ranges(self) -> list[tuple[int, int]]:
        """(source, place of the range in it) of every range; only after the cut."""
        return [
            (source, number)
            for source, cut in enumerate(read_cuts(self))
            for number in range(len(cut.last_keys))
        ]


class SelectionCut(NamedTuple):
    """The selection of one source: its number of rows, and the keys that bound them."""

    selected: int
    after: str | None
    """The last key that an earlier merge has given."""
    last_keys: Sequence[str]
    """The last key of each range."""


def read_cuts(plan: MergePlan) -> list[SelectionCut]:
    return [SelectionCut(*one) for one in json.loads((plan.temporary / "cuts.json").read_text())]


def make_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Call `make` on a folder beside `folder` and rename it, unless `folder` is there."""
    if folder.is_dir():
        return
    beside = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    make(beside)
    beside.rename(folder)


def make_plan(
    config: MergeConfig,
    files: Files,
    out: Path,
    threads: int | None,
    memory_limit: str,
    given: Sequence[str] = (),
) -> MergePlan:
    """Schema and row count of every file, before any of the long work.

    A file that cannot be read, lacks a column or is withdrawn is an `InputError`, and so is an
    empty source, unless files of what was `given` before say that there may be nothing new.
    """
    paths = [str(path) for paths in files.values() for path in paths]
    lists = ("blocklists.", "balance.")
    beside = [one.files for one in outside_files(config) if not one.role.startswith(lists)]
    outside = [*paths, *given, *beside]
    with open_database(out / "_tmp" / "spill", memory_limit, threads, outside) as connection:
        sidecars: list[Sidecar] = []
        found: list[MetadataFile] = []
        has_hash, known_columns = False, set[str]()
        for number, source in enumerate(config.sources):
            if not files.get(source.name):
                raise InputError(f"source '{source.name}': no file matches '{source.files}'")
            extra: dict[str, str] = {}
            for place, settings in enumerate(source.sidecars):
                sidecar, columns = _plan_sidecar(connection, source.name, number, place, settings)
                sidecars.append(sidecar)
                extra |= columns
            looked_at = [
                make_readable(connection, len(found) + place, str(path), source, out / "_tmp")
                for place, path in enumerate(files[source.name])
            ]
            known_columns.update(*(one.own for one in looked_at))
            planned, maps = _plan_files(config, number, looked_at, extra, len(found))
            found += planned
            has_hash = has_hash or any(columns.image_hash for columns in maps)
            if not given and not any(file.rows + file.bad_lines for file in planned):
                raise InputError(
                    f"source '{source.name}' is empty: '{source.files}' has "
                    f"{len(files[source.name])} file(s) without a single row; put its metadata "
                    "there or remove the source"
                )
        if config.hash_column and not has_hash:
            raise InputError(
                f"download.hash_column names '{config.hash_column}', but no source has such a "
                f"column; their columns are {', '.join(sorted(known_columns))}"
            )
        editions = _list_editions(connection, config)
        if config.balance and isinstance(config.balance.entries, str):
            read_entries(config.balance.entries)  # a mistake in it is not found after hours
    rows = sum(file.rows for file in found)
    partitions = config.partitions or min(MOST_PARTITIONS, max(1, -(-rows // ROWS_PER_PARTITION)))
    shared = (tuple(found), tuple(sidecars), editions, partitions)
    return MergePlan(config, out, *shared, threads, memory_limit, tuple(given))


def _plan_files(
    config: MergeConfig,
    number: int,
    looked_at: Sequence[ReadableFile],
    extra: schema.PublishedColumns,
    first: int,
) -> tuple[list[MetadataFile], list[ColumnMap]]:
    """The files of source `number`, numbered from `first`, and their column maps.

    Every rule that one file of a source can be judged by judges all of them.
    """
    source = config.sources[number]
    kinds = [{**one.own, **extra} for one in looked_at]
    maps = [
        _with_hash(config, schema.column_map(source, published, one.published_as, one.is_text), one)
        for one, published in zip(looked_at, kinds, strict=True)
    ]
    judged = schema.JudgedParts.of(list(zip(maps, kinds, strict=True)))
    planned = [
        MetadataFile(
            number=first + place,
            path=one.path,
            source=number,
            columns=schema.select_list(columns, published, judged),
            sidecar_keys=tuple(_sidecar_key(side, columns, one.own) for side in source.sidecars),
            rows=one.rows,
            bad_lines=sum(one.flaws.values()),
            first_bad_line=one.first_flaw,
        )
        for place, (one, columns, published) in enumerate(zip(looked_at, maps, kinds, strict=True))
    ]
    return planned, maps


def make_readable(
    connection: DuckDBPyConnection, number: int, path: str, source: SourceConfig, temporary: Path
) -> ReadableFile:
    """A metadata file as it is or, of text, its copy in `temporary`."""
    kind = format_of(path, source)
    if kind == "parquet":
        own = read_columns(connection, path)
        with explain_read_errors(path):
            return ReadableFile(path, path, own, False, rows_in(connection, [path]), {})
    converted = temporary / "converted" / f"{number:06d}"
    make_once(converted, lambda folder: convert_text(path, kind, source, folder))
    told = json.loads((converted / "told.json").read_text())
    return ReadableFile(str(converted / ROWS), path, is_text=True, **told)


def convert_text(path: str, kind: TextFormat, source: SourceConfig, folder: Path) -> None:
    """Write the rows of a text file into `folder` as parquet of texts, and what they are."""
    names = column_names(path, kind, source.quoting, source.header)
    if not names:
        raise InputError(f"{path} cannot be read as {kind}: it has no row")
    while later := _convert_columns(path, kind, source, folder, names):
        names = [*names, *later]  # a key that the first rows lack; all of it once more


def _convert_columns(
    path: str, kind: TextFormat, source: SourceConfig, folder: Path, names: Sequence[str]
) -> list[str]:
    """Write the columns `names` of a text file; returns others that were met, if there are any, and
    then what was written is not whole."""
    as_texts = pa.schema([(name, pa.string()) for name in names])
    known = set(names)
    numbers, values, flaws = Counter[str](), Counter[str](), Counter[str]()
    rows, first = 0, ""
    lines = read_text_table(path, kind, source.quoting, source.header)
    with pq.ParquetWriter(folder / ROWS, as_texts, compression="zstd") as writer:
        while batch := list(islice(lines, schema.ROWS_AT_ONCE)):
            good = [row.values for row in batch if row.flaw is None]
            if kind == "jsonl":
                others = (row for row in good if not row.keys() <= known)
                later = dict.fromkeys(name for row in others for name in row if name not in known)
                if later:
                    return list(later)
            for row in batch:
                if row.flaw is not None:
                    flaws[row.flaw] += 1
                    first = first or f"{path}, line {row.line}: {row.flaw}"
            columns = {name: [row.get(name) or None for row in good] for name in names}
            writer.write_table(table := pa.table(columns, schema=as_texts))
            rows += len(good)
            for name in names:
                there = table[name].drop_null()
                values[name] += len(there)
                numbers[name] += pc.sum(pc.match_substring_regex(there, _NUMBER)).as_py() or 0
    kinds = {n: "DOUBLE" if 2 * numbers[n] > values[n] else "VARCHAR" for n in names}
    told = {"own": kinds, "rows": rows, "flaws": flaws, "first_flaw": first}
    write_atomically(folder / "told.json", json.dumps(told))
    return []


def _with_hash(config: MergeConfig, columns: ColumnMap, file: ReadableFile) -> ColumnMap:
    """The map, its hash the column that the download compares with; "image_hash" is the map's."""
    if config.hash_column in ("", "image_hash"):
        return columns
    has = config.hash_column in file.own
    return columns.model_copy(update={"image_hash": config.hash_column if has else None})


def read_columns(connection: DuckDBPyConnection, path: str) -> dict[str, str]:
    """Columns of a parquet file -> the database's types."""
    query = "DESCRIBE SELECT * FROM read_parquet($path, hive_partitioning = false)"
    with explain_read_errors(path):
        rows = connection.execute(query, {"path": path}).fetchall()
    return {name: kind for name, kind, *_ in rows}


def _plan_sidecar(
    connection: DuckDBPyConnection, source: str, number: int, place: int, settings: SidecarConfig
) -> tuple[Sidecar, dict[str, str]]:
    """(a sidecar of source `number`, types of the columns that it adds)."""
    paths = find_metadata(settings.files, f"sidecar of {source}")
    published = [read_columns(connection, path) for path in paths]
    for path, columns in zip(paths, published, strict=True):
        for name in (settings.key, *settings.columns):
            if name not in columns:
                raise InputError(
                    f"{path}: sidecar of source '{source}' has no column '{name}'; "
                    f"its columns are {', '.join(columns)}"
                )
    keys = [schema.key_text(settings.key, columns[settings.key]) for columns in published]
    added = {name: published[0][name] for name in settings.columns}
    return Sidecar(number, place, settings, tuple(zip(paths, keys, strict=True))), added


def _sidecar_key(
    sidecar: SidecarConfig, columns: ColumnMap, published: schema.PublishedColumns
) -> str:
    if sidecar.on == "url":
        return schema.quote_identifier(columns.url)
    if sidecar.on == "id":
        return schema.key_text(columns.id, published[columns.id]) if columns.id else "NULL"
    if "hash" in published:
        return schema.key_text("hash", published["hash"])
    names = map(schema.quote_identifier, (columns.url, columns.caption))
    text = " || ".join(f"coalesce({name}, '')" for name in names)
    return f"laion_hash({text})"


def _list_editions(connection: DuckDBPyConnection, config: MergeConfig) -> tuple[Edition, ...]:
    compared: dict[str, list[int]] = {}
    for number, source in enumerate(config.sources):
        if source.diff_against:
            compared.setdefault(source.diff_against, []).append(number)
    editions = []
    for pattern, sources in compared.items():
        cleaned = SourceConfig(name="cleaned", files=pattern)
        files = [
            (path, schema.column_map(cleaned, read_columns(connection, path), path).url)
            for path in find_metadata(pattern, "diff_against")
        ]
        editions.append(Edition(tuple(sources), tuple(files)))
    return tuple(editions)


def rows_in(connection: DuckDBPyConnection, paths: Sequence[str]) -> int:
    """Rows of parquet files, as their footers tell."""
    if not paths:
        return 0
    query = "SELECT sum(num_rows) FROM parquet_file_metadata($paths)"
    [[rows]] = connection.execute(query, {"paths": list(paths)}).fetchall()
    return int(rows)


def read_entries(path: str) -> list[str]:
    """Entries of a text file, one a line, or of JSON: a list, or an object with them as keys."""
    where = f"merge.balance.entries: {path}"
    try:
        text = read_text(path)
        found = json.loads(text) if path.endswith(".json") else text.split("\n")
        if not isinstance(found, list | dict):
            raise TypeError("it is not a list")
        "".join(map(str, found)).encode()  # JSON can say halves of characters
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"{where} cannot be read ({shorten_error(error)}): name a text file (UTF-8) with one "
            "entry a line, or a .json with a list of texts"
        ) from error
    places: dict[str, int] = {}
    for place, entry in enumerate(found, 1):
        if not isinstance(entry, str) or len(entry) > MOST_CHARS:
            what = f"is not a text of at most {MOST_CHARS} characters"
            raise InputError(f"{where}, entry {place} {what}: take it out")
        text = entry.strip()
        if text and (first := places.setdefault(text, place)) != place:
            raise InputError(
                f"{where}, entry {place}, '{text}', is entry {first} again: take one out"
            )
    if not 0 < len(places) <= MOST_ENTRIES:
        raise InputError(f"{where} has {len(places):,} entries, not 1 to {MOST_ENTRIES:,}")
    return list(places)


def pairs_statement(most_words: int) -> str:
    """The statement pairs.sql for entries of at most so many words."""
    depths = range(1, most_words)
    runs = (load_statement("run", depth=str(n), before=str(n - 1)) for n in depths)
    found = (f"SELECT row, number FROM run_{n}" for n in range(most_words))
    words = "".join(f", unnest(words[{n + 1}:]) AS word_{n}" for n in depths)
    return load_statement("pairs", words=words, runs="".join(runs), found=" UNION ALL ".join(found))


class ColumnSummary(NamedTuple):
    name: str
    kind: str
    """The database's type."""
    part: str | None
    """What it would be in a column map."""
    null_share: float


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
        TemporaryDirectory() as spill,
        open_database(Path(spill), "1GB", None, paths) as connection,
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
            columns = schema.column_map(source, first.own, first.published_as, first.is_text)
            parts = {name: part for part, name in schema.column_parts(columns)}
        except InputError as error:
            problem = str(error)
        if schema.is_old_edition(first.own):
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
    own = files[0].own
    counted = (f"count({schema.quote_identifier(name)})" for name in own)
    counts = ", ".join(["count(*)", *counted])
    with explain_read_errors(files[0].published_as):
        [[rows, *there]] = connection.execute(f"SELECT {counts} FROM {table}", paths).fetchall()
    summaries = [
        ColumnSummary(name, kind, parts.get(name), 1 - values / max(rows, 1))
        for (name, kind), values in zip(own.items(), there, strict=True)
    ]
    return rows, summaries
