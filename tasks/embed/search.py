"""Search among features: the samples nearest to a text or a picture, exactly."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from tasks.embed.config import FEATURES

Vector = npt.NDArray[np.float32]


class Hit(NamedTuple):
    """A sample that was found."""

    likeness: float
    """Cosine of the angle between its feature and the query."""
    folder: Path
    """Of the features' artifact."""
    shard: int
    """Number in the verification."""
    place: int
    """In the shard."""
    uid: str
    score: float
    """Likeness of its own image and caption."""


def search_features(folders: list[Path], query: Vector, count: int) -> list[Hit]:
    """The `count` samples whose images are nearest to a unit vector [D], the nearest first, equal
    ones by uid. One shard is in memory at a time."""
    best: list[Hit] = []
    for folder in folders:
        for file in sorted((folder / FEATURES).glob("*.parquet")):
            best += _nearest_in(file, folder, query, count)
            best = sorted(best, key=lambda hit: (-hit.likeness, hit.uid))[:count]
    return best


def find_feature(folders: list[Path], uid: str) -> Vector | None:
    """The stored feature [D] of the image of the sample with this uid; None if there is none."""
    for folder in folders:
        for file in sorted((folder / FEATURES).glob("*.parquet")):
            found = pq.read_table(file, columns=["image"], filters=[("uid", "==", uid)])
            if len(found):
                return np.array(found["image"][0].as_py(), dtype=np.float32)
    return None


def _nearest_in(file: Path, folder: Path, query: Vector, count: int) -> Iterator[Hit]:
    table = pq.read_table(file, columns=["place", "uid", "image", "similarity"])
    column = table["image"].combine_chunks()
    features = column.flatten().to_numpy().astype(np.float32).reshape(len(column), -1)
    likeness = features @ query
    kept = min(count, len(likeness))
    # All that equal the last one are taken, so that uids decide among equals.
    least = np.partition(likeness, -kept)[-kept] if kept else np.inf
    for row in np.flatnonzero(likeness >= least).tolist():
        place, uid, score = (table[name][row].as_py() for name in ("place", "uid", "similarity"))
        yield Hit(float(likeness[row]), folder, int(file.stem), place, uid, score)
