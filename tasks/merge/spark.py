"""The merge on a Spark cluster: when one machine is outgrown.

Covers: a `Runner` that hands the units of every phase to Spark's workers, and deduplicates with
Spark's own shuffle instead of partition by partition.
Not here: the rules, the selection and the files, which are the same (filters.py, sql/, units.py).

A row's rules are the statements of the other engine, which every worker runs in a DuckDB of its own
over one metadata file at a time; Spark decides which row of an address stays, and spills as large
shuffles need. So there are no rules twice, and the rows are the same. The folder of the merge and
the metadata must be under the same path on every worker. The cluster is the environment's
(SPARK_CONF_DIR, spark-submit); without one it is this machine's cores.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from evaclip_model.errors import InputError
from tasks.merge.database import open_database
from tasks.merge.merge_plan import MergePlan, make_once
from tasks.merge.shuffle import BUCKET_BITS, partitions_in, read_keys
from tasks.merge.units import Chunk, rows_folder, run_chunk, text_of
from tasks.spark_session import spark_builder

KEYS = (
    "source int, file int, row_in_file long, place int, key string, bucket int, "
    "similarity double, original_id string"
)
"""Columns of a key for Spark; its texts are those of the database: `key::VARCHAR`."""
KEY_COLUMNS = [column.split()[0] for column in KEYS.split(", ")]
ROWS_OF_A_BATCH = 100_000


@contextmanager
def spark_runner() -> Iterator[Callable[[Sequence[Chunk]], Iterator[int]]]:
    """The `Runner` of a Spark session that lasts as long as the context.

    Raises:
        InputError: pyspark or Java is missing, or a worker met a user's mistake.
    """
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
    try:
        yield partial(_run_chunks, session)
    except PySparkException as error:
        raise InputError(f"Spark gave up: {_find_cause(error)}") from error
    finally:
        session.stop()


def _run_chunks(session: Any, chunks: Sequence[Chunk]) -> Iterator[int]:
    numbers = [number for chunk in chunks for number in chunk.numbers]
    if not chunks:
        return
    if chunks[0].phase == "dedupe":
        plan = chunks[0].plan
        make_once(plan.temporary / "kept" / "000000", partial(_dedupe_partitions, session, plan))
    else:
        session.sparkContext.parallelize(chunks, len(chunks)).foreach(_run_unit)
    yield from numbers


def _run_unit(chunk: Chunk) -> None:
    for _ in run_chunk(chunk):
        pass


def _dedupe_partitions(session: Any, plan: MergePlan, folder: Path) -> None:
    """Write for all partitions at once what the unit `dedupe` writes for one."""
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    folders = [(str(rows_folder(plan, file)), file.source, file.number) for file in plan.files]
    keys = _spread_rows(session, folders, "path string, source int, file int").mapInArrow(
        partial(_read_keys, str(plan.temporary), plan.memory_limit), KEYS
    )
    passing, lost = _compare_keys(session, plan, keys)
    best_first = Window.partitionBy("key").orderBy(
        "source",
        F.col("similarity").desc_nulls_last(),
        F.col("original_id").asc_nulls_last(),
        "file",
        "row_in_file",
    )
    before = F.lag("source").over(best_first)
    everyone = F.bit_or(F.expr("shiftleft(1L, source)")).over(Window.partitionBy("key"))
    deduped = passing.select(
        "source",
        "file",
        "place",
        "key",
        "bucket",
        F.when(before == F.col("source"), "duplicate_in_source")
        .when(before.isNotNull(), "duplicate_across_sources")
        .alias("reason"),
        (everyone - F.expr("shiftleft(1L, source)")).alias("others"),
    ).persist()
    kept = deduped.where("reason IS NULL")
    part = F.expr(f"shiftright(bucket * {plan.partitions}, {BUCKET_BITS})").alias("part")
    kept.select("source", "file", "place", "key", "bucket", "others", part).write.partitionBy(
        "part"
    ).parquet(str(folder / "rows"))
    counted = deduped.where("reason IS NOT NULL OR others <> 0")
    reasons = counted.groupBy("source", "reason", "others").count()
    for reason, frame in lost:
        counted = frame.selectExpr("source", f"'{reason}' AS reason", "0L AS others")
        reasons = reasons.unionByName(counted.groupBy("source", "reason", "others").count())
    histogram = kept.groupBy("source", "bucket").count()
    kinds = {"source": pa.int32(), "reason": pa.string(), "others": pa.int64()}
    _save_counts(reasons, folder / "reasons.parquet", kinds)
    _save_counts(
        histogram, folder / "histogram.parquet", {"source": pa.int32(), "bucket": pa.int32()}
    )
    deduped.unpersist()


def _compare_keys(session: Any, plan: MergePlan, keys: Any) -> tuple[Any, list[tuple[str, Any]]]:
    """(keys that pass, by reason keys that do not: their cleaned edition lacks the address, or an
    earlier merge has given it)."""
    from pyspark.sql import functions as F

    judged = [source for edition in plan.editions for source in edition.sources]
    passing, lost = keys, list[tuple[str, Any]]()
    if judged:
        passing = keys.where(~F.col("source").isin(judged))
    for number, edition in enumerate(plan.editions):
        own = keys.where(F.col("source").isin(list(edition.sources)))
        known = _read_known(session, plan, f"known/edition={number}/*/part=*/*.parquet")
        passing = passing.unionByName(
            own.join(known.distinct(), "key", "left_semi").select(KEY_COLUMNS)
        )
        gone = own.join(known, "key", "left_anti").select(KEY_COLUMNS)
        lost.append(("withdrawn", gone))
    if plan.given:
        number = len(plan.editions)
        given = _read_known(session, plan, f"known/edition={number}/*/part=*/*.parquet").distinct()
        lost.append(("given_before", passing.join(given, "key", "left_semi").select(KEY_COLUMNS)))
        passing = passing.join(given, "key", "left_anti").select(KEY_COLUMNS)
    return passing, lost


def _spread_rows(session: Any, rows: list[tuple[Any, ...]], schema: str) -> Any:
    """A frame whose rows, few but much work each, lie on as many workers as there are."""
    return session.createDataFrame(rows, schema).repartition(max(1, min(len(rows), 500)))


def _read_keys(
    temporary: str, memory_limit: str, folders: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """The keys in the units' folders of rows: Spark does not read their 16 bytes."""
    with open_database(_spill_of(temporary), memory_limit, 1) as connection:
        connection.execute("SET arrow_large_buffer_size = false")
        for batch in folders:
            for folder in batch.to_pylist():
                path = Path(folder["path"])
                for part in range(partitions_in(path)):
                    keys = read_keys(path, folder["source"], folder["file"], part)
                    connection.register("part_keys", keys)
                    columns = ", ".join(
                        "key::VARCHAR AS key" if name == "key" else name for name in KEY_COLUMNS
                    )
                    rows = connection.execute(f"SELECT {columns} FROM part_keys")
                    yield from rows.to_arrow_reader(ROWS_OF_A_BATCH)
                    connection.unregister("part_keys")


def _read_known(session: Any, plan: MergePlan, pattern: str) -> Any:
    """Keys of a cleaned edition."""
    paths = [(path,) for path in text_of(sorted(plan.temporary.glob(pattern)))]
    return _spread_rows(session, paths, "path string").mapInArrow(
        partial(_read_known_keys, str(plan.temporary), plan.memory_limit), "key string"
    )


def _read_known_keys(
    temporary: str, memory_limit: str, paths: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    with open_database(_spill_of(temporary), memory_limit, 1) as connection:
        connection.execute("SET arrow_large_buffer_size = false")
        for batch in paths:
            for path in batch.column(0).to_pylist():
                rows = connection.execute(
                    "SELECT DISTINCT key::VARCHAR AS key "
                    "FROM read_parquet($path, hive_partitioning = false)",
                    {"path": path},
                )
                yield from rows.to_arrow_reader(ROWS_OF_A_BATCH)


def _spill_of(temporary: str) -> Path:
    return Path(temporary, "spill", f"read-{os.getpid()}")


def _save_counts(counted: Any, path: Path, kinds: dict[str, pa.DataType]) -> None:
    """Write the few rows of a count as the unit does: its groups, and `rows`."""
    rows = [tuple(row) for row in counted.select(*kinds, "count").collect()]
    columns = list(zip(*rows, strict=True)) or [()] * (len(kinds) + 1)
    arrays = [
        pa.array(values, kind)
        for values, kind in zip(columns, (*kinds.values(), pa.int64()), strict=True)
    ]
    pq.write_table(pa.table(arrays, names=[*kinds, "rows"]), path)


def _find_cause(error: Exception) -> str:
    """The last line of an error that says something: workers' errors come with their traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    ours = [line for line in lines if "InputError" in line]
    return (ours or lines or [type(error).__name__])[-1].rpartition("InputError: ")[2][:300]
