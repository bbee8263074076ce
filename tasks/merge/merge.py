"""Merge metadata collections: filter, normalise, deduplicate, select, write; and count.

Not here: looking at the files first (merge_plan.py), one phase's units (units.py), the rules
(filters.py, sql/).

Memory depends on the size of a partition, never on the number of rows:

    phase          unit           makes
    split_keys     file           split over partitions: sidecar keys of metadata, sidecars' columns
                                  under theirs, keys of the addresses that a cleaned edition still
                                  has or an earlier merge has selected
    join_sidecars  partition      the sidecar's columns for the rows of every file
    scan           metadata file  passing rows with 16-byte keys, split over partitions; dropped
                                  rows by reason
    dedupe         partition      from its keys alone: which row of an address stays
    (cut)          source         keys where its selection, and each range of it, ends
    write          range          sorted output files

Key = md5(seed, address): a partition is a range of keys, and the smallest keys of a source are
selected, so a larger count selects the same rows and more, and hosts are mixed along the output.
In memory are a run of a metadata file (scan) or the rows of one partition (dedupe, write): 250,000
until there are 2,048 partitions (half a billion rows), then a 2,048th of all.
"""

import json
import os
import shutil
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from duckdb import DuckDBPyConnection

from evaclip_model.errors import InputError
from evaclip_model.files import write_atomically
from tasks.artifacts.artifact import INPUTS, Made
from tasks.merge.config import MergeConfig
from tasks.merge.database import execute_query, load_statement, open_database
from tasks.merge.filters import REASONS, UNREADABLE_LINE
from tasks.merge.merge_plan import Files, MergePlan, SelectionCut, make_plan, read_cuts, rows_in
from tasks.merge.metadata_files import file_identity, mark_of
from tasks.merge.shuffle import BUCKET_BITS, LAYOUT
from tasks.merge.units import (
    MATCHES,
    PHASES,
    Chunk,
    files_of_range,
    fill_blocklists,
    find_tables,
    kept_in,
    read_blocked,
    rows_folder,
    run_chunk,
)
from tasks.progress import Report, report_nothing
from tasks.spark_session import spark_builder

Runner = Callable[[Sequence[Chunk]], Iterator[int]]
"""Does the chunks of one phase, here or elsewhere; yields the number of every unit that is done."""
REPORT, ENTRY_ROWS = "report.json", "entries.json"
REMOVED = "_tmp.removed"
HISTOGRAMS = "*/*", "histogram"
MOST_NAMED = 1_000
"""Blocked addresses and host names without a row that the report names."""
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
    report: Report = report_nothing,
    *,
    threads: int | None = None,
    run: Runner = one_after_another,
    chunks: int = 1,
    memory_limit: str | None = None,
    given: Sequence[Path] = (),
) -> Made:
    """Merge `files` into `out/<source>/part-*.parquet`, `out/report.json` and `out/inputs.json`.

    `given` are folders of earlier merges: an address that one of them selected counts as dropped,
    and there may be none left.

    `run`, `chunks` (into how many each phase is cut, at most 500), and `threads` and `memory_limit`
    of one chunk's database (none = every core, the config's limit) never change the result.
    Columns of the output: uid (md5 of address and caption, hex), source, url, caption, original_id,
    similarity, width_hint, height_hint, also_in (other sources that have the address, with commas),
    and with the config's hash_column image_hash; rows in selection order, `rows_per_file` in every
    file but a source's last.
    """
    before = [str(path) for folder in given for path in sorted(folder.glob("*/part-*.parquet"))]
    _forget_other_work(out, config, files, before)
    plan = make_plan(config, files, out, threads, memory_limit or config.memory_limit, before)
    if config.engine == "spark":
        with spark_runner() as run_on_spark:
            _run_phases(plan, run_on_spark, MOST_CHUNKS, report)
    else:
        _run_phases(plan, run, chunks, report)
    with open_database(plan.temporary / "spill", plan.memory_limit, threads) as connection:
        cuts = read_cuts(plan)
        totals = _sum_totals(connection, plan, cuts)
        fill_blocklists(connection, config)
        blocked = read_blocked(connection, config)
        for file in plan.files:
            blocked -= set(json.loads((rows_folder(plan, file) / MATCHES).read_text()))
        parts = [path for range_ in plan.list_ranges() for path in files_of_range(plan, *range_)]
        written = rows_in(connection, list(map(str, parts)))
        if config.balance:
            totals["balance"] = _report_balance(connection, plan, config.balance.t)
    if written != (selected := sum(cut.selected for cut in cuts)):
        raise RuntimeError(f"{selected} rows selected, {written} written")
    if blocked:
        totals["blocked_nothing"] = sorted(blocked)[:MOST_NAMED]
    marks = {name: sorted(map(mark_of, files[name])) for name in files}
    write_atomically(out / INPUTS, json.dumps(marks, indent=1) + "\n")
    write_atomically(out / REPORT, json.dumps(totals, indent=1) + "\n")
    # a half-removed folder of units would look finished, so it goes out of their sight first
    plan.temporary.rename(out / REMOVED)
    shutil.rmtree(out / REMOVED)
    unmatched = f", {len(blocked):,} entries of blocklists match no row" if blocked else ""
    report(plan.rows, plan.rows, f"merged{unmatched}")
    outputs = (*parts, *out.glob(ENTRY_ROWS), out / REPORT, out / INPUTS)
    return Made(_flat_counts(totals), outputs)


def _run_phases(plan: MergePlan, run: Runner, chunks: int, report: Report) -> None:
    before = 0.0
    whole = sum(one.share for name, one in PHASES.items() if name == "write" or one.units(plan))
    for name, phase in PHASES.items():
        if name == "write":
            save_cuts(plan)
        units = phase.units(plan)
        part = phase.share / whole if units else 0.0
        report(round(before * plan.rows), plan.rows, f"{name}: 0 of {units}")
        # every n-th unit each, so that large files that lie together are shared out
        apart = min(chunks, units, MOST_CHUNKS)
        shared = [Chunk(plan, name, tuple(range(one, units, apart))) for one in range(apart)]
        for done, _ in enumerate(run(shared), 1):
            share = before + part * done / units
            report(round(share * plan.rows), plan.rows, f"{name}: {done} of {units}")
        before += part


def _forget_other_work(out: Path, config: MergeConfig, files: Files, given: Sequence[str]) -> None:
    """Clear what a killed run left when it was made from other files or settings."""
    shutil.rmtree(out / REMOVED, ignore_errors=True)
    plan = out / "_tmp" / "plan.json"
    wanted = json.dumps(
        {
            "layout": LAYOUT,
            "config": config.model_dump(mode="json", exclude={"memory_limit"}),
            "files": {name: [file_identity(str(path)) for path in files[name]] for name in files},
            "given": list(given),
        },
        sort_keys=True,
    )
    if plan.is_file() and plan.read_text() == wanted:
        return
    for leaving in (out / "_tmp", *(out / source.name for source in config.sources)):
        shutil.rmtree(leaving, ignore_errors=True)
    plan.parent.mkdir(parents=True)
    write_atomically(plan, wanted)


def sum_rows(
    connection: DuckDBPyConnection, plan: MergePlan, pattern: tuple[str, str], columns: str
) -> list[tuple[Any, ...]]:
    """(values of `columns`, rows) of every group of the units' counts in `pattern`."""
    found: list[tuple[Any, ...]] = connection.execute(
        f"SELECT {columns}, sum(rows)::BIGINT FROM read_parquet($paths, union_by_name = true, "
        "hive_partitioning = false) GROUP BY ALL",
        {"paths": find_tables(plan, *pattern)},
    ).fetchall()
    return found


def dropped_rows(connection: DuckDBPyConnection, plan: MergePlan) -> list[Counter[str]]:
    """Dropped rows of every source by reason, before selection."""
    counts = [Counter[str]() for _ in plan.config.sources]
    for source, reason, rows in sum_rows(connection, plan, ("*/*", "reasons"), "source, reason"):
        counts[source][reason] += rows
    for file in plan.files:
        counts[file.source][UNREADABLE_LINE] += file.bad_lines
    return [+count for count in counts]


def save_cuts(plan: MergePlan) -> None:
    """Select: save where each source's selection ends in key order, and the ranges it has."""
    saved = plan.temporary / "cuts.json"
    if saved.is_file():
        return
    with open_database(plan.temporary / "spill", plan.memory_limit, plan.threads) as connection:
        for source, reasons in enumerate(dropped_rows(connection, plan)):
            if not plan.given:
                _check_something_is_left(plan, source, reasons)
        histograms = [[0] * (1 << BUCKET_BITS) for _ in plan.config.sources]
        for source, bucket, rows in sum_rows(connection, plan, HISTOGRAMS, "source, bucket"):
            histograms[source][bucket] = rows
        cuts = [_cut_source(connection, plan, *found) for found in enumerate(histograms)]
    write_atomically(saved, json.dumps(cuts))


def _check_something_is_left(plan: MergePlan, source: int, reasons: Counter[str]) -> None:
    settings = plan.config.sources[source]
    files = plan.of_source(source)
    rows = sum(file.rows + file.bad_lines for file in files)
    survivors = rows - reasons.total()
    if survivors == 0:
        main, number = reasons.most_common(1)[0]
        first = next((file.first_bad_line for file in files if file.bad_lines), "")
        bad_line = f" (the first is {first})" if main == UNREADABLE_LINE else ""
        raise InputError(
            f"source '{settings.name}' has no row left of {rows}: most ({number}) were "
            f"dropped as {main}{bad_line}; check [merge.filters] and the source's columns"
        )
    if survivors <= settings.skip_count:
        raise InputError(
            f"source '{settings.name}' has no row left: {survivors} pass, and skip_count = "
            f"{settings.skip_count} leaves them out; there is nothing to fill back with"
        )


def _cut_source(
    connection: DuckDBPyConnection, plan: MergePlan, source: int, histogram: Sequence[int]
) -> SelectionCut:
    """The cut of a source; `histogram`: survivors by the first 16 bits of their key.

    Rows are selected in the order of their keys, from `skip_count` on. Sorting all keys to find the
    few that end a range would read everything once more: counts by bucket say in which bucket the
    n-th key is and its place there, so that only those buckets are read and sorted.
    """
    settings = plan.config.sources[source]
    up_to = list(accumulate(histogram))
    first = settings.skip_count
    left = up_to[-1] - first
    selected = left if settings.wanted_rows is None else min(settings.wanted_rows, left)
    if selected <= 0:
        return SelectionCut(0, None, ())
    # Rows counted from the beginning of the order: where the skipped ones end, then each range.
    steps = [*range(plan.rows_per_range, selected, plan.rows_per_range), selected]
    ends = [*([first] if first else []), *(first + step for step in steps)]
    buckets = [bisect_left(up_to, end) for end in ends]
    pairs = zip(ends, buckets, strict=True)
    places = [end - (up_to[bucket] - histogram[bucket]) for end, bucket in pairs]
    parts = sorted({bucket * plan.partitions >> BUCKET_BITS for bucket in buckets})
    paths = [kept_in(plan, part) for part in parts]
    parameters = {"buckets": buckets, "places": places, "source": source, "paths": paths}
    found = connection.execute(load_statement("cut"), parameters).fetchall()
    keys = [key for (key,) in found]
    if len(keys) != len(ends):
        raise RuntimeError(f"{len(ends)} cuts wanted, {len(keys)} found")
    return SelectionCut(selected, keys[0] if first else None, keys[1 if first else 0 :])


def _sum_totals(
    connection: DuckDBPyConnection, plan: MergePlan, cuts: Sequence[SelectionCut]
) -> dict[str, Any]:
    sources: list[dict[str, Any]] = []
    passed = Counter(dict(sum_rows(connection, plan, HISTOGRAMS, "source")))
    for number, dropped in enumerate(dropped_rows(connection, plan)):
        settings, files = plan.config.sources[number], plan.of_source(number)
        rows = sum(file.rows for file in files)
        read = rows + sum(file.bad_lines for file in files)
        selected, survivors = cuts[number].selected, passed[number]
        given = min(settings.skip_count, survivors)
        reasons = dropped + Counter(given_before=given, not_selected=survivors - given - selected)
        if reasons.total() + selected != read or not set(reasons) <= set(REASONS):
            raise RuntimeError(
                f"source '{settings.name}': {selected} selected and {reasons.total()} dropped "
                f"({dict(reasons)}) are not the {read} rows read"
            )
        sidecars = []
        for place, sidecar in plan.sidecars_of(number):
            matched = rows_in(connection, find_tables(plan, f"joined/{place}/*/file=*"))
            sidecars.append({"files": sidecar.config.files, "rows": rows, "matched": matched})
        sources.append(
            {
                "name": settings.name,
                "files": len(files),
                "target_count": settings.target_count,
                "rows_read": read,
                "selected": selected,
                "dropped": {reason: reasons[reason] for reason in REASONS},
                "unreadable_lines": [file.first_bad_line for file in files if file.bad_lines],
                "sidecars": sidecars,
            }
        )
    total: dict[str, Any] = {
        name: sum(source[name] for source in sources) for name in ("rows_read", "selected")
    }
    dropped_for = {one: sum(source["dropped"][one] for source in sources) for one in REASONS}
    return {"total": total | {"dropped": dropped_for}, "sources": sources}


def _report_balance(connection: DuckDBPyConnection, plan: MergePlan, t: int) -> dict[str, Any]:
    """The part of the report about entries; writes how many rows hold each."""
    entries = find_tables(plan, "counted/*", "entries")
    rows = "SELECT entry, rows FROM read_parquet($entries) ORDER BY number"
    held = dict(connection.execute(rows, {"entries": entries}).fetchall())
    write_atomically(plan.out / ENTRY_ROWS, json.dumps(held, indent=1, ensure_ascii=False) + "\n")
    parameters = {"entries": entries, "kept_at": find_tables(plan, "balanced/*", "kept_at"), "t": t}
    found = execute_query(connection, load_statement("balance_report"), parameters)
    return dict(found.to_arrow_table().to_pylist()[0])


def _flat_counts(totals: Mapping[str, Any]) -> dict[str, int]:
    """Counts of the manifest: totals, then every source's, without the buckets that are empty."""
    counts: dict[str, int] = {}
    for part in (totals["total"], *totals["sources"]):
        prefix = f"{part['name']}." if "name" in part else ""
        counts[f"{prefix}rows_read"] = part["rows_read"]
        counts[f"{prefix}selected"] = part["selected"]
        counts[f"{prefix}dropped"] = sum(part["dropped"].values())
        counts |= {f"{prefix}dropped.{one}": rows for one, rows in part["dropped"].items() if rows}
        for place, sidecar in enumerate(part.get("sidecars", ())):
            counts[f"{prefix}sidecar{place}.matched"] = sidecar["matched"]
    if found := totals.get("balance"):
        counts |= {f"balance.{name}": n for name, n in found.items() if isinstance(n, int)}
        counts |= {f"balance.kept_at.{one['t']}": one["rows"] for one in found["kept_at"]}
    return counts


@contextmanager
def spark_runner() -> Iterator[Runner]:
    """The `Runner` of a Spark session that lasts as long as the context."""
    try:
        from pyspark.errors import PySparkException

        building = spark_builder("evaclip merge")
    except ImportError as error:
        raise InputError(
            "engine = 'spark' needs pyspark and Java 17: pip install 'evaclip[spark]'"
        ) from error
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    root = str(Path(__file__).parents[2])
    try:
        session = building.config("spark.executorEnv.PYTHONPATH", root).getOrCreate()
    except (PySparkException, OSError) as error:
        raise InputError(
            f"Spark does not start ({_find_cause(error)}): it needs Java 17, as JAVA_HOME or `java`"
        ) from error

    def run_chunks(chunks: Sequence[Chunk]) -> Iterator[int]:
        if chunks:  # each a task, which Spark tries again elsewhere when its worker dies
            shared = session.sparkContext.parallelize(chunks, len(chunks))
            yield from shared.flatMap(run_chunk).collect()

    try:
        yield run_chunks
    except PySparkException as error:
        raise InputError(f"Spark gave up: {_find_cause(error)}") from error
    finally:
        session.stop()


def _find_cause(error: Exception) -> str:
    """The last line of an error that says something: workers' errors come with their traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    ours = [line for line in lines if "InputError" in line]
    return (ours or lines or [type(error).__name__])[-1].rpartition("InputError: ")[2][:300]
