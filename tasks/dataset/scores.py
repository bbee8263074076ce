"""Rules that leave samples out by a model's score, and by lists of uids as DataComp publishes them.

Not here: making scores (tasks/embed), the order of the rules (choose.py).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from evaclip_model.errors import InputError
from evaclip_model.reading.urls import read_text
from tasks.index.sample_index import Mask, SampleIndex

Scores = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
SCORE_PARTS = 80
"""Of a histogram, from -1 to 1."""
UIDS_AT_ONCE = 1_000_000


def find_low_scores(
    scores: Scores,
    stays: Mask,
    sources: Rows,
    min_score: float | None,
    keep_share: float | None,
    uids_of: Callable[[Rows], Sequence[str]],
) -> Mask:
    """Rows that a score leaves out, of those that stay so far, [rows].

    Args:
        stays: rows that no earlier rule left out, [rows].
        sources: number of every row's source, [rows].
        min_score: rows below it go.
        keep_share: of each source this share of what is left stays, rounded to the nearest whole
            row: the best scores and, among equal ones, the first uids.
        uids_of: the uids of rows, which ascend.
    """
    low = np.zeros(len(scores), dtype=np.bool_)
    if min_score is not None:
        low |= stays & (scores < min_score)
    if keep_share is None:
        return low
    for source in np.unique(sources):
        rows = np.flatnonzero(stays & ~low & (sources == source))
        keep = math.floor(keep_share * len(rows) + 0.5)
        if keep == len(rows):
            continue
        mine = scores[rows]
        lowest = np.partition(mine, len(rows) - keep)[len(rows) - keep] if keep else np.inf
        low[rows[mine < lowest]] = True
        equal = rows[mine == lowest]
        wanted = keep - int((mine > lowest).sum())
        if wanted < len(equal):
            order = sorted(range(len(equal)), key=list(uids_of(equal)).__getitem__)
            low[equal[order[wanted:]]] = True
    return low


def count_scores(scores: Scores, sources: Rows, count: int) -> Rows:
    """Histogram [sources, SCORE_PARTS] of scores, in equal parts of -1 to 1."""
    parts = ((scores + 1) * (SCORE_PARTS / 2)).astype(np.int16).clip(0, SCORE_PARTS - 1)
    counted = np.bincount(sources * SCORE_PARTS + parts, minlength=count * SCORE_PARTS)
    return counted.reshape(count, SCORE_PARTS)


def read_uids(files: Iterable[Path]) -> Iterator[pa.Array]:
    """The uids of lists, some at a time: text with a uid a line, or an array of pairs of 64-bit
    numbers as DataComp publishes it (.npy), whose uid is the 32 hex digits of a pair."""
    for file in files:
        try:
            if file.suffix == ".npy":
                yield from _read_pairs(np.load(file, mmap_mode="r", allow_pickle=False))
            else:
                lines = (line.strip() for line in read_text(file).splitlines())
                yield pa.array([line for line in lines if line], pa.string())
        except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
            raise InputError(
                f"{file} cannot be read as a list of uids, one a line, or as DataComp's .npy of "
                f"pairs of uint64 ({error})"
            ) from None


def uids_of_rows(index: SampleIndex, rows: Rows) -> list[str]:
    """The uids of some rows, in their order; `rows` ascend."""
    found = pq.read_table(index.files, columns=["uid"], filters=pc.field("row").isin(rows))
    return list(found["uid"].to_pylist())


def _read_pairs(pairs: npt.NDArray[np.void]) -> Iterator[pa.Array]:
    if [field[1] for field in pairs.dtype.descr] != ["<u8"] * 2:
        raise ValueError(f"it holds {pairs.dtype}, not pairs of uint64")
    for start in range(0, len(pairs), UIDS_AT_ONCE):
        numbers = np.ascontiguousarray(pairs[start : start + UIDS_AT_ONCE]).view("<u8")
        text = numbers.astype(">u8").tobytes().hex().encode()  # as written, the highest digit first
        whole = pa.Array.from_buffers(pa.binary(32), len(numbers) // 2, [None, pa.py_buffer(text)])
        yield whole.cast(pa.string())
