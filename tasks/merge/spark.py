"""The merge on a Spark cluster: a `Runner` that hands the units of every phase to its workers.

Every worker does its units in a DuckDB of its own, so the rows are the same whatever runs them. The
folder of the merge and the metadata must be under the same path on every worker. The cluster is the
environment's (SPARK_CONF_DIR, spark-submit); without one it is this machine's cores.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from evaclip_model.errors import InputError
from tasks.merge.units import Chunk, run_chunk
from tasks.spark_session import spark_builder


@contextmanager
def spark_runner() -> Iterator[Callable[[Sequence[Chunk]], Iterator[int]]]:
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
    try:
        yield partial(_run_chunks, session.sparkContext)
    except PySparkException as error:
        raise InputError(f"Spark gave up: {_find_cause(error)}") from error
    finally:
        session.stop()


def _run_chunks(context: Any, chunks: Sequence[Chunk]) -> Iterator[int]:
    """Every chunk is a task of its own, which Spark tries again elsewhere when its worker dies."""
    if chunks:
        yield from context.parallelize(chunks, len(chunks)).flatMap(run_chunk).collect()


def _find_cause(error: Exception) -> str:
    """The last line of an error that says something: workers' errors come with their traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    ours = [line for line in lines if "InputError" in line]
    return (ours or lines or [type(error).__name__])[-1].rpartition("InputError: ")[2][:300]
