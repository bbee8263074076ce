"""Dataset versions by scores, lists of uids and features: `bench_dataset.py [SAMPLES] [WIDTH]`.

Invents the index of a verification and features of WIDTH numbers, in which one sample in ten is a
near copy of the one before, 3 degrees off, and no other two are within 20; of WIDTH 0, scores and
uids alone, without versions by angle. Makes versions by the real code, each in a process of its
own, checks what they leave out, and prints a Markdown table: seconds, CPU seconds, peak memory.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.dataset.config import DatasetConfig, OutsideFiles, Seen
from tasks.dataset.dataset import Takedowns, make_dataset
from tasks.embed.config import FEATURES
from tasks.embed.embed import find_features, read_scores
from tasks.progress import report_nothing
from tests.benchmarks.bench_trace import Invented, prepare

CENTRES = 20_000
RULES = "no rule of scores"
SEMANTIC = "semantic_duplicates = 6"
ORIGINAL, COPY = 6, 7
"""Last digits of the numbers of a sample and its near copy; the images of 8 and 9 are the same."""


def main() -> None:
    samples, width = int(sys.argv[1]), int(sys.argv[2])
    with tempfile.TemporaryDirectory(prefix="evaclip-bench-dataset-") as folder:
        bench(samples, width, Path(folder))


def bench(samples: int, width: int, root: Path) -> None:
    verified = prepare(Invented(samples, True), root, [])
    write_features(samples, width, root / "features")
    pairs = [(root / "features", verified.folder)]
    uids = np.concatenate([half_of(file) for file, _ in find_features(pairs)])
    np.save(root / "half.npy", uids)
    (root / "some.txt").write_text("".join(f"{a:016x}{b:016x}\n" for a, b in uids[::100]))
    half, some = (root / "half.npy",), (root / "some.txt",)

    def make(said: str, outside: OutsideFiles, base: str = "", **settings: float) -> None:
        out = root / "dataset" / said
        out.mkdir(parents=True)
        seen = Seen(read_scores(pairs)[0], find_features(pairs)) if settings else None
        config, taken_over = DatasetConfig(**settings), root / "dataset" / base if base else None
        made = make_dataset(
            *(config, [verified], outside, Takedowns(), out, report_nothing, seen, taken_over)
        )
        assert made.counts.get("left_out.exact_duplicate") == samples // 10 or outside.keep_uids
        if "semantic_duplicates" in settings:
            assert made.counts["left_out.semantic_duplicate"] == samples // 10

    angle = {"semantic_duplicates": 6.0}
    print(f"{samples:,} samples, features of {width} numbers\n")
    print("| version | wall, s | CPU, s | peak, GB |\n|---|---|---|---|")
    versions = (
        (RULES, OutsideFiles(), "", {}),
        ("... and min_score = 0.2", OutsideFiles(), RULES, {"min_score": 0.2}),
        ("... and keep_share = 0.3", OutsideFiles(), RULES, {"keep_share": 0.3}),
        ("keep_uids: half of them, .npy", OutsideFiles(keep_uids=half), "", {}),
        ("drop_uids: one in 200, text", OutsideFiles(drop_uids=some), "", {}),
        (SEMANTIC, OutsideFiles(), "", angle),
        (
            "... and keep_share",
            OutsideFiles(),
            SEMANTIC,
            {"semantic_duplicates": 6, "keep_share": 0.3},
        ),
    )
    for said, outside, base, settings in versions:
        if not width and "semantic_duplicates" in settings:
            continue
        measure(said, partial(make, said, outside, base, **settings))


def measure(said: str, work: Callable[[], None]) -> None:
    """Do it in a process of its own, and print what it took."""
    begin_s = time.monotonic()
    if (child := os.fork()) == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    _, status, used = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{said}: failed")
    wall, cpu = time.monotonic() - begin_s, used.ru_utime + used.ru_stime
    print(f"| {said} | {wall:.1f} | {cpu:.1f} | {used.ru_maxrss / 1e6:.2f} |", flush=True)


def half_of(file: Path) -> np.ndarray:
    """The uids of every second sample, as DataComp writes them."""
    found = pq.read_table(file, columns=["uid"])["uid"].to_pylist()[::2]
    return np.array([(int(uid[:16], 16), int(uid[16:], 16)) for uid in found], dtype="u8,u8")


def write_features(samples: int, width: int, folder: Path) -> None:
    (folder / FEATURES).mkdir(parents=True)
    centres = np.random.default_rng(0).normal(size=(CENTRES, width)).astype(np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    invented = Invented(samples, True)
    for shard, size in enumerate(invented.shards):
        draw = np.random.default_rng([shard, 7])
        columns = {
            "place": pa.array(np.arange(size), pa.int32()),
            "uid": invented._hashes(shard)["uid"],
            "similarity": pa.array(draw.normal(0.25, 0.06, size=size), pa.float32()),
        }
        if width:
            numbers = pa.array(invent_features(draw, size, centres).astype(np.float16).reshape(-1))
            columns["image"] = pa.FixedSizeListArray.from_arrays(numbers, width)
        pq.write_table(
            pa.table(columns), folder / FEATURES / f"{shard:06d}.parquet", compression="zstd"
        )


def invent_features(draw: np.random.Generator, size: int, centres: np.ndarray) -> np.ndarray:
    """Unit features [size, width] near the centres, and their near copies."""
    width = centres.shape[1]
    noise = draw.normal(size=(size, width)).astype(np.float32) / width**0.5
    rows = centres[draw.integers(CENTRES, size=size)] + 0.8 * noise
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    turn = noise[COPY::10] / np.linalg.norm(noise[COPY::10], axis=1, keepdims=True)
    first = rows[ORIGINAL::10]
    turn -= (turn * first).sum(1, keepdims=True) * first
    turn /= np.linalg.norm(turn, axis=1, keepdims=True)
    rows[COPY::10] = np.cos(np.radians(3)) * first + np.sin(np.radians(3)) * turn
    return rows


if __name__ == "__main__":
    main()
