"""Further captions joined to a large index: `bench_captions.py [SAMPLES ...] [--folder FOLDER]`.

Invents the samples of a verification and a caption for each, named by uid in another order (a
million by default; 20 million take about 8 GB in FOLDER), and joins them as `[[captions]]` are, in
a process of its own. Prints CPU time, peak memory and the count of what matched, a line a size.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.dataset.config import CaptionSource
from tasks.dataset.sidecars import write_sidecars
from tasks.index.sample_index import INDEX, SampleIndex, write_index
from tasks.progress import report_nothing
from tests.benchmarks.bench_trace import Invented

MEMORY_LIMIT = "400MB"
"""DuckDB's, of a query."""
SPREAD = 7_919
"""Captions are those of samples this far apart, and so on around."""
ROWS_AT_ONCE = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("samples", type=int, nargs="*", default=[1_000_000])
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    print(f"DuckDB's limit at {MEMORY_LIMIT}\n")
    print("| captions and samples | matched | CPU, s | wall, s | peak memory, GB |")
    print("|---|---|---|---|---|")
    for samples in arguments.samples:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            run_apart(partial(invent, samples, Path(folder)))
            print(f"| {samples:,} | {measure_join(Path(folder))} |", flush=True)


def invent(samples: int, folder: Path) -> None:
    """Write `index/` and `recap.parquet`."""
    invented = Invented(samples, narrow=True)
    write_index(invented.tables(folder / "tables"), folder / INDEX, MEMORY_LIMIT)
    shutil.rmtree(folder / "tables")
    uids = pa.concat_tables(SampleIndex(folder).iterate_chunks("uid"))["uid"]
    order = np.arange(samples, dtype=np.int64) * SPREAD % samples
    with pq.ParquetWriter(
        folder / "recap.parquet", pa.schema([("uid", pa.string()), ("caption", pa.string())])
    ) as writer:
        for start in range(0, samples, ROWS_AT_ONCE):
            places = order[start : start + ROWS_AT_ONCE]
            texts = [f"a picture, told anew in a sentence or so, number {n}" for n in places]
            columns = [uids.take(pa.array(places)).combine_chunks(), pa.array(texts)]
            writer.write_table(pa.table(columns, schema=writer.schema))


def measure_join(folder: Path) -> str:
    """What is said of the join."""
    sidecar = CaptionSource(name="recap", files=str(folder / "recap.parquet"), key="uid")
    found, started = folder / "found.txt", time.monotonic()

    def join() -> None:
        index = SampleIndex(folder, MEMORY_LIMIT)
        counts = write_sidecars(index, [(sidecar, [sidecar.files])], folder, report_nothing)
        found.write_text(f"{counts['recap']['matched']:,}")

    used = run_apart(join)
    cpu, wall = used.ru_utime + used.ru_stime, time.monotonic() - started
    return f"{found.read_text()} | {cpu:,.0f} | {wall:,.0f} | {used.ru_maxrss / 1e6:.2f}"


def run_apart(work: Callable[[], None]) -> resource.struct_rusage:
    """What `work` took, in a process of its own that begins small."""
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    _, status, used = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{work} failed")
    return used


if __name__ == "__main__":
    main()
