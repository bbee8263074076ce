"""Merge metadata collections: filter, normalise, deduplicate, select, write.

Covers: the phases, their order, and what makes them restartable.
Not here: the rules themselves (sql/), the meaning of columns (schema.py), the settings (config.py).

Memory depends on the size of a partition, never on the number of rows:

    scan    metadata file      -> 16-byte keys of passing rows, split over partitions; reasons
    dedupe  partition of keys  -> the row that stays of every address, with its selection rank
    cut     source             -> exact ranks where its selection, and each range of it, ends
    gather  metadata file      -> the selected rows, split over ranges of the selection order
    write   range              -> sorted output files

Rank = md5(seed, key): the `target_count` smallest ranks of a source are selected, so a larger
count selects the same rows and more, and hosts are mixed along the output.

Each unit of work makes a folder or file beside its place and renames it; a unit whose result is
there is not done again. Everything temporary is under `out/_tmp`.
"""

from __future__ import annotations

import json
import shutil
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from duckdb import DuckDBPyConnection

from evaclip_model.errors import InputError
from tasks.artifact import Made, write_atomically
from tasks.merge.config import FilterConfig, MergeConfig
from tasks.merge.database import copy, database, reading, statement
from tasks.merge.schema import column_map, select_list
from tasks.progress import Report, silent

Files = Mapping[str, Sequence[Path]]
"""Source name -> its parquet files, in order."""

REASONS = (
    "missing_url",
    "unsupported_url",
    "missing_caption",
    "short_caption",
    "long_caption",
    "small_image",
    "extreme_aspect",
    "low_similarity",
    "unknown_similarity",
    "unsafe",
    "unknown_unsafe",
    "watermark",
    "unknown_watermark",
    "duplicate_in_source",
    "duplicate_across_sources",
    "not_selected",
)
"""Why a row is dropped: the first rule, in this order, that it fails."""

REPORT = "report.json"
KNOWN_TAGS = ("UNLIKELY", "UNSURE", "NSFW")
ROWS_PER_PARTITION = 4_000_000
ROWS_PER_RANGE = 1_000_000
BUCKETS = 1 << 16
SHARE_OF_TIME = {"scan": 0.5, "dedupe": 0.2, "gather": 0.2, "write": 0.1}


@dataclass(frozen=True)
class MetadataFile:
    """One input file: what to read of it, and how many rows it must give."""

    number: int
    """Place among all files of the merge."""
    path: Path
    source: int
    """Place of its source in the config."""
    columns: str
    """Select list that gives it the common columns."""
    rows: int


@dataclass(frozen=True)
class Cut:
    """How many rows of a source are selected, and the last rank of each range of them."""

    selected: int
    last_ranks: tuple[str, ...]


@dataclass(frozen=True)
class Merge:
    """Everything the phases share; nothing of it changes while they run."""

    config: MergeConfig
    out: Path
    files: tuple[MetadataFile, ...]
    connection: DuckDBPyConnection
    report: Report

    @property
    def temporary(self) -> Path:
        return self.out / "_tmp"

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    @property
    def partitions(self) -> int:
        return self.config.partitions or -(-self.rows // ROWS_PER_PARTITION)

    @property
    def rows_per_range(self) -> int:
        """A multiple of the rows of a file, so that every file lies in one range."""
        return max(1, ROWS_PER_RANGE // self.config.rows_per_file) * self.config.rows_per_file

    def of_source(self, source: int) -> list[MetadataFile]:
        return [file for file in self.files if file.source == source]

    def progress(self, phase: str, share: float, detail: str) -> None:
        phases = list(SHARE_OF_TIME)
        before = sum(SHARE_OF_TIME[name] for name in phases[: phases.index(phase)])
        done = (before + share * SHARE_OF_TIME[phase]) * self.rows
        self.report(round(done), self.rows, f"{phase}: {detail}")


def merge_sources(
    config: MergeConfig,
    files: Files,
    out: Path,
    report: Report = silent,
    *,
    threads: int | None = None,
) -> Made:
    """Merge `files` into `out/<source>/part-*.parquet` and `out/report.json`.

    `threads` (none = every core) never changes the result. Columns of the output: uid (md5 of
    address and caption, hex), source, url, caption, original_id, similarity, width_hint and
    height_hint; rows in selection order, `rows_per_file` in every file but a source's last.

    Raises:
        InputError: a source has no file, a file cannot be read or lacks a column, or a source gives
            no row.
    """
    temporary = out / "_tmp"
    _forget_other_work(out, config, files)
    with database(temporary / "spill", config.memory_limit, threads) as connection:
        work = Merge(config, out, _inspect(connection, config, files), connection, report)
        _scan(work)
        _dedupe(work)
        dropped = _count_reasons(work)
        cuts = _cut(work, dropped)
        _gather(work, cuts)
        parts = _write(work, cuts)
        totals = _totals(work, dropped, cuts)
        _check_output(work, parts, cuts)
    write_atomically(out / REPORT, json.dumps(totals, indent=1) + "\n")
    shutil.rmtree(temporary)
    return Made(_flat_counts(totals), (*parts, out / REPORT))


def _forget_other_work(out: Path, config: MergeConfig, files: Files) -> None:
    """Clear what a killed run left when it was made from other files or settings."""
    plan = out / "_tmp" / "plan.json"
    wanted = json.dumps(
        {
            "config": config.model_dump(mode="json", exclude={"memory_limit"}),
            "files": {
                name: [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
                for name, paths in files.items()
            },
        },
        sort_keys=True,
    )
    if plan.is_file() and plan.read_text() == wanted:
        return
    for leaving in (out / "_tmp", *(out / source.name for source in config.sources)):
        shutil.rmtree(leaving, ignore_errors=True)
    plan.parent.mkdir(parents=True)
    write_atomically(plan, wanted)


def _inspect(
    connection: DuckDBPyConnection, config: MergeConfig, files: Files
) -> tuple[MetadataFile, ...]:
    """Schema and row count of every file, before any of the long work."""
    found: list[MetadataFile] = []
    for number, source in enumerate(config.sources):
        if not files.get(source.name):
            raise InputError(f"source '{source.name}': no file matches '{source.files}'")
        for path in files[source.name]:
            with reading(path):
                description = connection.execute(
                    "DESCRIBE SELECT * FROM read_parquet($path, hive_partitioning = false)",
                    {"path": str(path)},
                ).fetchall()
                rows = _rows_in(connection, [path])
            published = {name: kind for name, kind, *_ in description}
            columns = select_list(column_map(source, published, path), published)
            found.append(MetadataFile(len(found), path, number, columns, rows))
        if not any(file.rows for file in found if file.source == number):
            raise InputError(
                f"source '{source.name}' is empty: '{source.files}' has {len(files[source.name])} "
                "file(s) without a single row; put its metadata there or remove the source"
            )
    return tuple(found)


def _scan(work: Merge) -> None:
    for file in work.files:
        work.progress("scan", file.number / len(work.files), file.path.name)
        _once(work.temporary / "keys" / f"{file.number:06d}", partial(_scan_file, work, file))


def _scan_file(work: Merge, file: MetadataFile, folder: Path) -> None:
    query = statement("scan", normalise=statement("normalise"), columns=file.columns)
    with reading(file.path):
        work.connection.execute(
            copy(query, "PARTITION_BY (part)"),
            {
                **_rule_parameters(work.config.filters),
                "path": str(file.path),
                "source": file.source,
                "file": file.number,
                "partitions": work.partitions,
                "target": str(folder),
            },
        )


def _dedupe(work: Merge) -> None:
    for part in range(work.partitions):
        work.progress("dedupe", part / work.partitions, f"part {part + 1} of {work.partitions}")
        keys = sorted(work.temporary.glob(f"keys/*/part={part}/*.parquet"))
        if keys:
            _once(
                work.temporary / "kept" / f"{part:06d}",
                partial(_dedupe_partition, work, keys),
            )


def _dedupe_partition(work: Merge, keys: Sequence[Path], folder: Path) -> None:
    connection = work.connection
    connection.execute(statement("dedupe"), {"paths": _text(keys), "seed": work.config.seed})
    connection.execute(
        copy("SELECT source, reason, count(*) AS rows FROM deduped GROUP BY ALL", "CODEC zstd"),
        {"target": str(folder / "reasons.parquet")},
    )
    connection.execute(
        copy(
            "SELECT source, ('0x' || left(rank::VARCHAR, 4))::INTEGER AS bucket, "
            "count(*) AS rows FROM deduped WHERE reason IS NULL GROUP BY ALL",
            "CODEC zstd",
        ),
        {"target": str(folder / "histogram.parquet")},
    )
    (folder / "rows").mkdir()
    connection.execute(
        copy(
            "SELECT file, row_in_file, rank FROM deduped WHERE reason IS NULL",
            "PARTITION_BY (file)",
        ),
        {"target": str(folder / "rows")},
    )
    connection.execute("DROP TABLE deduped")


def _count_reasons(work: Merge) -> list[Counter[str]]:
    """Dropped rows of every source by reason, before selection."""
    counts = [Counter[str]() for _ in work.config.sources]
    rejected = sorted(work.temporary.glob("keys/*/part=-1/*.parquet"))
    duplicates = sorted(work.temporary.glob("kept/*/reasons.parquet"))
    for paths, number in ((rejected, "count(*)"), (duplicates, "sum(rows)")):
        if paths:
            for source, reason, rows in work.connection.execute(
                f"SELECT source, reason, {number} FROM read_parquet($paths, "
                "hive_partitioning = false) WHERE reason IS NOT NULL GROUP BY ALL",
                {"paths": _text(paths)},
            ).fetchall():
                counts[source][reason] += int(rows)
    return counts


def _cut(work: Merge, dropped: Sequence[Counter[str]]) -> list[Cut]:
    """Select: where each source's selection ends in rank order, and the ranges it is written in.

    Raises:
        InputError: a source has no row left.
    """
    for source, (settings, reasons) in enumerate(zip(work.config.sources, dropped, strict=True)):
        rows = sum(file.rows for file in work.of_source(source))
        if reasons.total() == rows:
            main, number = reasons.most_common(1)[0]
            raise InputError(
                f"source '{settings.name}' has no row left of {rows}: most ({number}) were "
                f"dropped as {main}; check [merge.filters] and the source's columns"
            )
    saved = work.temporary / "cuts.json"
    if not saved.is_file():
        cuts = [_cut_source(work, source) for source in range(len(work.config.sources))]
        write_atomically(saved, json.dumps([[cut.selected, cut.last_ranks] for cut in cuts]))
    return [Cut(selected, tuple(ranks)) for selected, ranks in json.loads(saved.read_text())]


def _cut_source(work: Merge, source: int) -> Cut:
    histogram = [0] * BUCKETS
    for bucket, rows in work.connection.execute(
        "SELECT bucket, sum(rows) FROM read_parquet($paths, hive_partitioning = false) "
        "WHERE source = $source GROUP BY bucket",
        {"paths": _text(sorted(work.temporary.glob("kept/*/histogram.parquet"))), "source": source},
    ).fetchall():
        histogram[bucket] = int(rows)
    up_to = list(accumulate(histogram))
    target = work.config.sources[source].target_count
    selected = up_to[-1] if target is None else min(target, up_to[-1])
    ends = [*range(work.rows_per_range, selected, work.rows_per_range), selected]
    buckets = [bisect_left(up_to, end) for end in ends]
    places = [
        end - (up_to[bucket] - histogram[bucket]) for end, bucket in zip(ends, buckets, strict=True)
    ]
    kept = [
        path
        for file in work.of_source(source)
        for path in sorted(work.temporary.glob(f"kept/*/rows/file={file.number}/*.parquet"))
    ]
    ranks = work.connection.execute(
        statement("cut"), {"buckets": buckets, "places": places, "paths": _text(kept)}
    ).fetchall()
    if len(ranks) != len(ends):
        raise RuntimeError(f"{len(ends)} cuts wanted, {len(ranks)} found")
    return Cut(selected, tuple(rank for (rank,) in ranks))


def _gather(work: Merge, cuts: Sequence[Cut]) -> None:
    for file in work.files:
        work.progress("gather", file.number / len(work.files), file.path.name)
        kept = sorted(work.temporary.glob(f"kept/*/rows/file={file.number}/*.parquet"))
        if kept:
            _once(
                work.temporary / "rows" / f"{file.number:06d}",
                partial(_gather_file, work, file, kept, cuts[file.source]),
            )


def _gather_file(
    work: Merge, file: MetadataFile, kept: Sequence[Path], cut: Cut, folder: Path
) -> None:
    query = statement("gather", normalise=statement("normalise"), columns=file.columns)
    with reading(file.path):
        work.connection.execute(
            copy(query, "CODEC zstd, PARTITION_BY (part)"),
            {
                "path": str(file.path),
                "kept": _text(kept),
                "last_ranks": list(cut.last_ranks),
                "source": work.config.sources[file.source].name,
                "target": str(folder),
            },
        )


def _write(work: Merge, cuts: Sequence[Cut]) -> list[Path]:
    """Write every range's files; its gathered rows go once they are no longer needed."""
    per_file = work.config.rows_per_file
    ranges = sum(len(cut.last_ranks) for cut in cuts)
    parts: list[Path] = []
    done = 0
    for source, cut in enumerate(cuts):
        folder = work.out / work.config.sources[source].name
        folder.mkdir(exist_ok=True)
        digits = max(5, len(str(cut.selected // per_file)))
        for number in range(len(cut.last_ranks)):
            first = number * work.rows_per_range
            last = min(first + work.rows_per_range, cut.selected)
            wanted = {
                folder / f"part-{start // per_file:0{digits}d}.parquet": start - first
                for start in range(first, last, per_file)
            }
            work.progress("write", done / ranges, folder.name)
            _write_range(work, source, number, wanted)
            parts += wanted
            done += 1
    work.report(work.rows, work.rows, "merged")
    return parts


def _write_range(work: Merge, source: int, number: int, wanted: Mapping[Path, int]) -> None:
    folders = [
        work.temporary / "rows" / f"{file.number:06d}" / f"part={number}"
        for file in work.of_source(source)
    ]
    missing = {path: start for path, start in wanted.items() if not path.is_file()}
    if missing:
        gathered = [path for folder in folders for path in sorted(folder.glob("*.parquet"))]
        work.connection.execute(statement("order"), {"paths": _text(gathered)})
        for path, start in missing.items():
            beside = work.temporary / path.name
            work.connection.execute(
                copy(statement("write"), "CODEC zstd"),
                {
                    "first": start,
                    "last": start + work.config.rows_per_file,
                    "target": str(beside),
                },
            )
            beside.replace(path)
        work.connection.execute("DROP TABLE ordered")
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _totals(
    work: Merge, dropped: Sequence[Counter[str]], cuts: Sequence[Cut]
) -> dict[str, list[dict[str, Any]] | dict[str, Any]]:
    """The report: every row read is selected or in exactly one bucket.

    Raises:
        RuntimeError: the rows do not add up; a bug, never the user's doing.
    """
    sources: list[dict[str, Any]] = []
    for number, settings in enumerate(work.config.sources):
        reasons = dropped[number]
        read = sum(file.rows for file in work.of_source(number))
        selected = cuts[number].selected
        survivors = work.connection.execute(
            "SELECT coalesce(sum(rows), 0) FROM read_parquet($paths, hive_partitioning = false) "
            "WHERE source = $source AND reason IS NULL",
            {
                "paths": _text(sorted(work.temporary.glob("kept/*/reasons.parquet"))),
                "source": number,
            },
        ).fetchall()
        reasons = reasons + Counter({"not_selected": int(survivors[0][0]) - selected})
        if reasons.total() + selected != read or not set(reasons) <= set(REASONS):
            raise RuntimeError(
                f"source '{settings.name}': {selected} selected and {reasons.total()} dropped "
                f"({dict(reasons)}) are not the {read} rows read"
            )
        sources.append(
            {
                "name": settings.name,
                "files": len(work.of_source(number)),
                "target_count": settings.target_count,
                "rows_read": read,
                "selected": selected,
                "dropped": {reason: reasons[reason] for reason in REASONS},
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


def _check_output(work: Merge, parts: Sequence[Path], cuts: Sequence[Cut]) -> None:
    written = _rows_in(work.connection, parts)
    selected = sum(cut.selected for cut in cuts)
    if written != selected:
        raise RuntimeError(f"{selected} rows selected, {written} written")


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


def _rule_parameters(filters: FilterConfig) -> dict[str, Any]:
    return {**filters.model_dump(), "known_tags": [*KNOWN_TAGS, *filters.unsafe_tags]} | {
        "unsafe_tags": list(filters.unsafe_tags)
    }


def _rows_in(connection: DuckDBPyConnection, paths: Sequence[Path]) -> int:
    found = connection.execute(
        "SELECT sum(num_rows) FROM parquet_file_metadata($paths)", {"paths": _text(paths)}
    ).fetchall()
    return int(found[0][0])


def _once(folder: Path, make: Callable[[Path], None]) -> None:
    """Call `make` on a folder beside `folder` and rename it, unless `folder` is there."""
    if folder.is_dir():
        return
    beside = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    make(beside)
    beside.rename(folder)


def _text(paths: Iterable[Path]) -> list[str]:
    return [str(path) for path in paths]
