"""Rows between the scan and the output: Arrow batches on disk, split over the partitions.

A folder holds the passing rows of one metadata file twice in the same order: `keys.arrows` is what
deduplication reads, `texts.arrows` what only the output needs. Each is an Arrow IPC file, in which
batch `run * partitions + part` holds what a run has for a partition, even if that is nothing: one
file instead of one for a partition, however many there are, and no encoding that costs more than
the rows are worth.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

ROWS_PER_RUN, ROWS_PER_PIECE = 125_000, 256
"""Rows of a metadata file that are in memory at once: so many, or so many for each partition."""
BUCKET_BITS = 16
"""First bits of a key that say which partition it is in."""
TEXT = pa.large_string()
"""Offsets of 64 bits: a run of very long URLs is larger than 2 GB."""
LAYOUT = 12
"""Version of what lies in the folders: units of another one are made again."""
KEYS = pa.schema(
    [
        ("row_in_file", pa.int64()),
        ("key", pa.uuid()),
        ("bucket", pa.int32()),
        ("similarity", pa.float64()),
        ("original_id", TEXT),
    ]
)
TEXTS = pa.schema(
    [
        *(("url", TEXT), ("caption", TEXT), ("image_hash", TEXT)),
        *(("width_hint", pa.int64()), ("height_hint", pa.int64())),
    ]
)
REASONS = pa.schema([("source", pa.int32()), ("reason", pa.string()), ("rows", pa.int64())])
KINDS = {"keys": KEYS, "texts": TEXTS}


def write_rows(
    judged: Iterable[pa.RecordBatch], folder: Path, source: int, partitions: int
) -> None:
    """Split the passing rows of one metadata file over the partitions; `judged` are rows of
    scan.sql, one batch a run, `key` none where there is a `reason`."""
    dropped = Counter[str]()
    with ExitStack() as stack:
        files = [
            (schema.names, stack.enter_context(pa.ipc.new_file(folder / f"{kind}.arrows", schema)))
            for kind, schema in KINDS.items()
        ]
        for run in judged:
            for count in pc.value_counts(pc.drop_null(run.column("reason"))).to_pylist():
                dropped[count["values"]] += count["counts"]
            for batch in _split_run(run, partitions):
                for names, file in files:
                    file.write_batch(batch.select(names))
    counts = [{"source": source, "reason": name, "rows": rows} for name, rows in dropped.items()]
    pq.write_table(pa.Table.from_pylist(counts, REASONS), folder / "reasons.parquet")


def read_rows(folder: Path, kind: str, part: int, partitions: int) -> pa.Table:
    """One partition of a folder's `keys` or `texts`; both have the same rows in the same order."""
    file = pa.ipc.open_file(pa.memory_map(str(folder / f"{kind}.arrows")))
    batches = map(file.get_batch, range(part, file.num_record_batches, partitions))
    return pa.Table.from_batches(batches, KINDS[kind])


def read_keys(folder: Path, source: int, file: int, part: int, partitions: int) -> pa.Table:
    """Keys of a partition with source, file and `place`: their number in `read_rows`."""
    keys = read_rows(folder, "keys", part, partitions)
    origin = {
        "source": np.full(len(keys), source, np.int32),
        "file": np.full(len(keys), file, np.int32),
        "place": np.arange(len(keys), dtype=np.int32),
    }
    return pa.table(dict(zip(keys.column_names, keys.columns, strict=True)) | origin)


def is_alone(keys: pa.Table) -> npt.NDArray[np.bool_]:
    """[rows] Whether no other row's key begins with the same 64 bits: it has no duplicate."""
    begins = [_key_bytes(chunk).view(np.uint64)[:, 0] for chunk in keys.column("key").chunks]
    first = np.concatenate([np.empty(0, np.uint64), *begins])
    # Half a key suffices: two rows that share 64 bits by chance are only compared for nothing.
    _, found, rows = np.unique(first, return_inverse=True, return_counts=True)
    return np.asarray(rows[found] == 1)


def _key_bytes(keys: pa.ExtensionArray) -> npt.NDArray[np.uint8]:
    """[rows, 16] Bytes of keys in the order of their hex digits; arbitrary where there is none."""
    every = np.frombuffer(keys.storage.buffers()[1], np.uint8).reshape(-1, 16)
    return every[keys.offset : keys.offset + len(keys)]


def _split_run(run: pa.RecordBatch, partitions: int) -> Iterator[pa.RecordBatch]:
    """The passing rows of a run, one batch a partition."""
    key = run.column("key")
    passing = np.flatnonzero(key.is_valid().to_numpy(zero_copy_only=False))
    begins = _key_bytes(key)[passing, :2].astype(np.int32)
    bucket = begins[:, 0] << 8 | begins[:, 1]
    part = (bucket.astype(np.int64) * partitions >> BUCKET_BITS).astype(np.uint16)
    # One sort by partition, then slices: a filter for each partition would read the run again for
    # every one of up to 2,048 partitions.
    order = np.argsort(part, kind="stable")
    bounds = np.searchsorted(part[order], np.arange(partitions + 1))
    taken = run.take(pa.array(passing[order])).append_column("bucket", pa.array(bucket[order]))
    sorted_run = taken.select([*KEYS.names, *TEXTS.names])
    # A slice without rows would be written with the whole run's texts: Arrow cuts only others.
    nothing = sorted_run.take(pa.array([], pa.int64()))
    for first, end in pairwise(bounds):
        yield sorted_run.slice(first, end - first) if end > first else nothing
