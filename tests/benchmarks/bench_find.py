"""Find among many features: `bench_find.py [SAMPLES] [--width 512] [--folder FOLDER]`.

Invents the features of an embedding (1 KB a sample in FOLDER, and as much again for the index),
indexes them with the real code, and asks for the ten nearest of features that are not among them.
Made up are points near a hundred thousand centres in 40 directions, because features of pictures
lie in about so many (Pope et al. 2021, "The Intrinsic Dimension of Images": 26 to 43 in ImageNet).
Of the texts only the first shard's are stored, and parquet files are not compressed: made-up
numbers would not shrink. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tasks.artifacts.artifact import Address, Made, produce_artifact
from tasks.embed.config import FEATURES, STAGE as EMBED
from tasks.embed.feature_index import FeatureIndex
from tasks.embed.search import Searched, Wanted, search_features
from tasks.progress import report_nothing

PER_SHARD = 10_000
DIRECTIONS = 40
CENTRES = 100_000
SPREAD = 0.7
QUERIES = 20
EXACT = 1
"""Times that everything is read without an index."""


class Invented:
    """A made-up world of features."""

    def __init__(self, width: int) -> None:
        draw = np.random.default_rng(0)
        self.map = draw.standard_normal((DIRECTIONS, width), np.float32)
        self.centres = draw.standard_normal((CENTRES, DIRECTIONS), np.float32)

    def features(self, seed: int, count: int) -> np.ndarray:
        """Unit features [count, width]."""
        draw = np.random.default_rng([seed])
        near = self.centres[draw.integers(0, CENTRES, count)]
        near = near + SPREAD * draw.standard_normal(near.shape, np.float32)
        wide = near @ self.map
        return wide / np.linalg.norm(wide, axis=1, keepdims=True)

    def write(self, out: Path, samples: int) -> Made:
        (out / FEATURES).mkdir()
        for number in range(samples // PER_SHARD):
            image = self.features(number, PER_SHARD).astype(np.float16)
            columns = [
                pa.array(range(PER_SHARD), pa.int32()),
                pa.array([f"{number:06d}-{place:04d}" for place in range(PER_SHARD)]),
                pa.FixedSizeListArray.from_arrays(pa.array(image.reshape(-1)), image.shape[1]),
                pa.array(np.full(PER_SHARD, 0.3, np.float32)),
            ]
            table = pa.table(columns, ["place", "uid", "image", "similarity"])
            table = table.append_column("text", table["image"]) if not number else table
            pq.write_table(table, out / FEATURES / f"{number:06d}.parquet", compression="none")
        return Made({"samples": samples}, ())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("samples", type=int, nargs="?", default=10_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.folder:
        return bench(options.folder, options.samples, options.width)
    with tempfile.TemporaryDirectory(prefix="evaclip-bench-find-") as folder:
        bench(Path(folder), options.samples, options.width)


def bench(root: Path, samples: int, width: int) -> None:
    world = Invented(width)
    embedded = produce_artifact(
        Address(root, EMBED, {"samples": samples, "width": width}, {}),
        lambda out: world.write(out, samples),
    )
    print(
        f"{samples:,} made-up features of {width} numbers\n\n| what | wall | CPU |\n|---|---|---|"
    )
    before = time.monotonic(), time.process_time()
    index = FeatureIndex(root, embedded, report_nothing)
    made = time.monotonic() - before[0], time.process_time() - before[1]
    print(f"| the index made | {made[0]:,.0f} s | {made[1]:,.0f} s |")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    queries = world.features(10**9, QUERIES)
    sources = {number: "s" for number in range(samples // PER_SHARD)}
    found = {}
    for name, count, among, wanted in (
        ("by the index", QUERIES, index.find_nearest, Wanted(10)),
        ("by the index, again", QUERIES, index.find_nearest, Wanted(10)),
        ("in every list of the index", QUERIES, index.find_nearest, Wanted(10, is_exact=True)),
        ("without an index", EXACT, None, Wanted(10)),
    ):
        begin = time.monotonic(), time.process_time()
        found[name] = [
            search_features([Searched(embedded.folder, sources, among)], query, wanted)
            for query in queries[:count]
        ]
        took = [1e3 * (end - start) / count for start, end in zip(begin, clock(), strict=True)]
        print(f"| a search {name} | {took[0]:,.0f} ms | {took[1]:,.0f} ms |", flush=True)
        if name == "in every list of the index":
            hit = [
                len({a[1:4] for a in one} & {b[1:4] for b in two})
                for one, two in zip(found[name], found["by the index"], strict=True)
            ]
            print(f"| recall@10 of {QUERIES} new queries | {np.mean(hit) / 10:.3f} | |")
    every = found["in every list of the index"]
    for one, two in zip(found["without an index"], every, strict=False):
        assert [hit[1:4] for hit in one] == [hit[1:4] for hit in two]
    size = sum(file.stat().st_size for file in index.made.folder.iterdir())
    print(
        f"\nrecall@10 {index.made.counts['recall_at_10']} measured when it was made; "
        f"{index.made.counts['probed']} lists read of each part; {size / samples:,.0f} bytes a "
        f"sample; peak memory {peak:.2f} GiB"
    )


def clock() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


if __name__ == "__main__":
    main()
