"""Search among features: the samples nearest to a text or a picture, by reading all features of
every shard. Not here: an index of very many (feature_index.py)."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.embed.config import FEATURES

Vector = npt.NDArray[np.float32]


class Wanted(NamedTuple):
    most: int = 10
    source: str = ""  # any
    min_score: float = -1.0
    max_score: float = 1.0
    is_exact: bool = False  # every sample is looked at, also where there is an index


class Hit(NamedTuple):
    likeness: float
    """Cosine of the angle between its feature and the query."""
    folder: Path
    """Of the features' artifact."""
    shard: int
    """Number in the verification."""
    place: int
    """In the shard."""
    score: float
    """Likeness of its own image and caption."""


class Searched(NamedTuple):
    """One artifact of features."""

    folder: Path
    sources: Mapping[int, str]
    """Source of every shard, by its number in the verification."""
    search_index: Callable[[Vector, Wanted, Sequence[int]], list[Hit]] | None = None
    """Finds what is wanted in some shards."""


def search_features(among: Sequence[Searched], query: Vector, wanted: Wanted) -> list[Hit]:
    """The samples whose images are nearest to a unit vector [D], the nearest first, equal ones by
    place. Without an index as many shards are in memory as there are cores."""
    best: list[Hit] = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "search") as pool:
        for one in among:
            shards = [n for n, source in one.sources.items() if wanted.source in ("", source)]
            if one.search_index is not None:
                found = iter([one.search_index(query, wanted, shards)])
            else:
                files = [shard_features(one.folder, number) for number in shards]
                found = pool.map(partial(_nearest_in, one.folder, query, wanted), files)
            for hits in found:
                best = sorted(best + hits, key=lambda hit: (-hit.likeness, hit[1:]))[: wanted.most]
    return best


def shard_features(folder: Path, shard: int) -> Path:
    return folder / FEATURES / f"{shard:06d}.parquet"


def read_feature(folder: Path, shard: int, place: int) -> Vector | None:
    """The stored feature [D] of the image at a place of a shard; None if there is none."""
    file = shard_features(folder, shard)
    if not file.exists():
        return None
    found = pq.read_table(file, columns=["image"], filters=[("place", "==", place)])["image"]
    return np.array(found[0].as_py(), dtype=np.float32) if len(found) else None


def _nearest_in(folder: Path, query: Vector, wanted: Wanted, file: Path) -> list[Hit]:
    table = pq.read_table(file, columns=["place", "image", "similarity"], use_threads=False)
    places, scores = table["place"].to_numpy(), table["similarity"].to_numpy()
    likeness = vectors_of(table["image"]).astype(np.float32) @ query
    fits = np.flatnonzero((scores >= wanted.min_score) & (scores <= wanted.max_score))
    # A stable order, so that places decide among equals.
    return [
        Hit(float(likeness[row]), folder, int(file.stem), int(places[row]), float(scores[row]))
        for row in fits[np.argsort(-likeness[fits], kind="stable")[: wanted.most]]
    ]


def vectors_of(column: pa.ChunkedArray) -> npt.NDArray[np.float16]:
    """A column of float16 lists as [N, D]."""
    whole = column.combine_chunks()
    halves: npt.NDArray[np.float16] = whole.flatten().to_numpy().reshape(len(whole), -1)
    return halves
