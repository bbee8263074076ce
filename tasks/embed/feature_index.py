"""An index of many features, for searches in milliseconds: parts of some hundred thousand, each
sorted into lists around centres, of which a search reads the nearest from the disk.

Faiss (the extra `search`) makes and reads the lists, which hold the features as they are stored: a
likeness is the same as without an index. What lies in lists further away is missed; how much that
is was measured when the index was made.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from evaclip_model.files import replace_file
from tasks.artifacts.artifact import Address, Artifact, Made, Stage, produce_artifact
from tasks.artifacts.root_store import fetch_artifact
from tasks.embed.config import FEATURES
from tasks.embed.search import Hit, Vector, Wanted, vectors_of
from tasks.progress import Report

STAGE = Stage("search", 1, tools=("faiss-cpu",))
PART_ROWS = 500_000
"""About so many features are in memory while a part is made, in about three copies."""
BLOCK = 1 << 15
"""Features that are sorted into lists at once."""
TRAINED_ON = 50
"""Features a centre, of which the centres are computed."""
JUDGED = 64
"""Images, and as many texts, whose ten nearest samples say how many lists a search must read."""
LEAST_RECALL = 0.95
ROW = np.dtype([("shard", "i4"), ("place", "i4"), ("score", "f4")])
Numbers = npt.NDArray[np.int64]


def address_index(root: Path, features: Artifact) -> Address:
    return Address(root, STAGE, {}, {"features": features.digest})


class FeatureIndex:
    """The index of an artifact of features, made where it is not there yet or a kill left it."""

    def __init__(self, root: Path, features: Artifact, report: Report) -> None:
        address, self.features = address_index(root, features), features.folder
        self.made = produce_artifact(address, lambda out: make_index(features, out, report))
        """Its counts are the `probed` lists of a part and the `recall_at_10` that these gave."""
        files = sorted(fetch_artifact(self.made.folder, report=report).glob("*.faiss"))
        self._parts = [_open_part(file) for file in files]

    def find_nearest(self, query: Vector, wanted: Wanted, shards: Sequence[int]) -> list[Hit]:
        """In each part the samples nearest to a unit vector [D], among some shards."""
        found: list[Hit] = []
        for lists, rows in self._parts:
            fits = (rows["score"] >= wanted.min_score) & (rows["score"] <= wanted.max_score)
            fits &= not wanted.source or np.isin(rows["shard"], shards)
            left = int(fits.sum())
            # So that as many samples are compared as without a filter.
            few = int(self.made.counts["probed"]) * len(rows) // max(1, left)
            for probed in (lists.nlist if wanted.is_exact else few, lists.nlist):
                likeness, numbers = _search_lists(lists, query[None], wanted.most, probed, fits)
                numbers = numbers[numbers >= 0]
                if len(numbers) >= min(wanted.most, left):
                    break
            pairs = zip(likeness[0].tolist(), rows[numbers].tolist(), strict=False)
            found += [Hit(near, self.features, *row) for near, row in pairs]
        return found


def make_index(features: Artifact, out: Path, report: Report) -> Made:
    """Index an artifact of features part by part; a part that is there is kept."""
    files = sorted((features.folder / FEATURES).glob("*.parquet"))
    total = int(features.counts["samples"])
    step, made = max(1, PART_ROWS * len(files) // total), list[Path]()
    for first in range(0, len(files), step):
        report(total * first / len(files), total)
        part = out / f"{first:06d}.faiss"
        if not part.exists():
            _write_part(files[first : first + step], part)
        made += part, part.with_suffix(".npy")
    probed, recall = _choose_probed(_open_part(made[0])[0], files[0])
    return Made({"probed": probed, "recall_at_10": recall}, (), tuple(made))


def _write_part(files: Sequence[Path], target: Path) -> None:
    rows, halves = [], []
    for file in files:
        table = pq.read_table(file, columns=["place", "image", "similarity"])
        number = np.full(len(table), int(file.stem))
        rows.append(np.rec.fromarrays([number, table["place"], table["similarity"]], ROW))
        halves.append(vectors_of(table["image"]))
    stored = np.concatenate(halves)
    del halves
    centres = max(1, int(2 * len(stored) ** 0.5))
    form = f"IVF{centres},SQfp16"
    lists = faiss.index_factory(stored.shape[1], form, faiss.METRIC_INNER_PRODUCT)
    lists.by_residual = False  # the features themselves, not their differences to a centre
    drawn = np.random.default_rng(0).permutation(len(stored))[: TRAINED_ON * centres]
    lists.train(stored[np.sort(drawn)].astype(np.float32))
    for start in range(0, len(stored), BLOCK):
        lists.add(stored[start : start + BLOCK].astype(np.float32))
    with replace_file(target.with_suffix(".npy")) as beside, beside.open("wb") as opened:
        np.save(opened, np.concatenate(rows))
    with replace_file(target) as beside:  # the last, because it says that the part is whole
        faiss.write_index(lists, str(beside))


def _open_part(file: Path) -> tuple[Any, npt.NDArray[Any]]:
    """The lists of a part, which stay on the disk, and the samples that its numbers mean."""
    lists = faiss.read_index(str(file), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    return lists, np.load(file.with_suffix(".npy"), mmap_mode="r")


def _search_lists(
    lists: Any, queries: Vector, count: int, probed: int, fits: npt.NDArray[np.bool_]
) -> tuple[Vector, Numbers]:
    """Likeness and number [Q, count] of what is nearest to queries [Q, D]; -1 where nothing is."""
    chosen = None if fits.all() else faiss.IDSelectorBitmap(np.packbits(fits, bitorder="little"))
    settings = faiss.SearchParametersIVF(nprobe=min(probed, lists.nlist), sel=chosen)
    found: tuple[Vector, Numbers] = lists.search(queries, count, params=settings)
    return found


def _choose_probed(lists: Any, file: Path) -> tuple[int, float]:
    """The lists that a search must read to find nearly all, and the share of the ten nearest that
    it finds: of images and texts of the first file, among the samples of the first part."""
    table = pq.read_table(file, columns=["image", "text"]).slice(0, JUDGED)
    queries = np.concatenate([vectors_of(table[name]) for name in ("image", "text")])
    asked = (lists, queries.astype(np.float32), 10)
    every = np.ones(lists.ntotal, dtype=bool)
    true, probed, recall = _search_lists(*asked, lists.nlist, every)[1], 0, 0.0
    while recall < LEAST_RECALL and probed < lists.nlist:
        probed = min(1 + probed * 5 // 4, lists.nlist)
        found = _search_lists(*asked, probed, every)[1]
        recall = float(np.mean([np.isin(*pair).mean() for pair in zip(true, found, strict=True)]))
    return probed, round(recall, 4)
