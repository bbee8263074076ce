"""Rules that leave samples out by a model's score, and by lists of uids as DataComp publishes them.

Not here: making scores (tasks/embed), the order of the rules (choose.py).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from evaclip_model.errors import InputError
from evaclip_model.reading.urls import read_text
from tasks.index.sample_index import SampleIndex

Mask = npt.NDArray[np.bool_]
Scores = npt.NDArray[np.float32]
UidsOf = Callable[[npt.NDArray[np.int64]], Sequence[str]]
"""The uids of rows."""


def find_low_scores(
    scores: Scores,
    stays: Mask,
    sources: npt.NDArray[np.int64],
    min_score: float | None,
    keep_share: float | None,
    uids_of: UidsOf,
) -> Mask:
    """Rows that a score leaves out, of those that stay so far, [rows].

    Args:
        stays: rows that no earlier rule left out, [rows].
        sources: number of every row's source, [rows].
        min_score: rows below it go.
        keep_share: of each source this share of what is left stays, rounded to the nearest whole
            row: the best scores and, among equal ones, the first uids.
    """
    low = np.zeros(len(scores), dtype=np.bool_)
    if min_score is not None:
        low |= stays & (scores < min_score)
    if keep_share is None:
        return low
    for source in np.unique(sources):
        rows = np.flatnonzero(stays & ~low & (sources == source) & ~np.isnan(scores))
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


def read_uids(files: Iterable[Path]) -> pa.Array:
    """The uids of lists, sorted, each once: text with a uid a line, or an array of pairs of
    64-bit numbers as DataComp publishes it (.npy), whose uid is the 32 hex digits of a pair."""
    found: list[pa.Array] = []
    for file in files:
        try:
            if file.suffix == ".npy":
                found.append(_read_pairs(np.load(file, mmap_mode="r", allow_pickle=False)))
            else:
                lines = (line.strip() for line in read_text(file).splitlines())
                found.append(pa.array([line for line in lines if line], pa.string()))
        except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
            raise InputError(
                f"{file} cannot be read as a list of uids, one a line, or as DataComp's .npy of "
                f"pairs of uint64 ({error})"
            ) from None
    joined = pa.concat_arrays(found) if found else pa.array([], pa.string())
    return pc.unique(joined).sort()


def find_listed(index: SampleIndex, uids: pa.Array) -> Mask:
    """Rows whose uid is in a list, [rows]."""
    parts = [
        pc.is_in(table["uid"], value_set=uids).to_numpy() for table in index.iterate_chunks("uid")
    ]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.bool_)


def uids_of_rows(index: SampleIndex, rows: npt.NDArray[np.int64]) -> list[str]:
    """The uids of some rows, in their order; `rows` ascend."""
    found: list[str] = []
    start = 0
    for table in index.iterate_chunks("uid"):
        stop = start + table.num_rows
        mine = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)]
        found += table["uid"].take(pa.array(mine - start)).to_pylist()
        start = stop
    return found


def _read_pairs(pairs: npt.NDArray[np.void]) -> pa.Array:
    names = pairs.dtype.names or ()
    if [pairs.dtype[name].str for name in names] != ["<u8"] * 2:
        raise ValueError(f"it holds {pairs.dtype}, not pairs of uint64")
    first, second = names
    return pa.array([f"{one[first]:016x}{one[second]:016x}" for one in pairs], pa.string())
