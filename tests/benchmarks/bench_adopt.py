"""Adopting and verifying shards of small images, beside webdataset alone reading them: CPU seconds
per 1,000 images. `bench_adopt.py [SHARDS [IMAGES]]`, by default 20 shards of 1,000 images.

What ours does besides reading: SHA-256 of the shard and of every image, decoding and the perceptual
hash of every image, the index. Runs are interleaved, the least of three counts.
"""

from __future__ import annotations

import io
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from tasks.adopt.adopt import adopt_sources
from tasks.adopt.config import AdoptConfig
from tasks.progress import report_nothing
from tasks.verify.config import VerifyConfig
from tasks.verify.verify import verify_shards

SIDE_PX = 64
REPEATS = 3


def write_shards(folder: Path, shards: int, images: int) -> None:
    random = np.random.default_rng(0)
    for number in range(shards):
        with webdataset.TarWriter(str(folder / f"{number:05d}.tar")) as tar:
            for place in range(images):
                small = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                file = io.BytesIO()
                Image.fromarray(small).resize((SIDE_PX, SIDE_PX)).save(file, "JPEG")
                key = f"{number:05d}{place:05d}"
                tar.write({"__key__": key, "jpg": file.getvalue(), "txt": f"picture {key}"})


def read_by_webdataset(folder: Path, _: Path) -> None:
    shards = sorted(map(str, folder.glob("*.tar")))
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        assert sample["jpg"]
        assert sample["txt"]


def adopt_only(folder: Path, out: Path) -> None:
    source = {"name": "mine", "files": str(folder)}
    config = AdoptConfig.from_mapping({"sources": [source]}, where="benchmark")
    adopt_sources(config, out, report_nothing)


def adopt_and_verify(folder: Path, out: Path) -> None:
    adopt_only(folder, out)
    (out / "verified").mkdir()
    verify_shards(VerifyConfig(), out, out / "verified", 1, report_nothing)


def measure_cpu_s(work: Callable[[Path, Path], None], folder: Path) -> float:
    """User and system time of `work` and its children, in a process of its own."""
    with tempfile.TemporaryDirectory() as out:
        child = os.fork()
        if not child:
            work(folder, Path(out))
            os._exit(0)
        _, status, used = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{work.__name__} failed")
    assert isinstance(used, resource.struct_rusage)
    return used.ru_utime + used.ru_stime


def main(shards: int, images: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_shards(folder, shards, images)
        sides = (read_by_webdataset, adopt_only, adopt_and_verify)
        runs = [{side: measure_cpu_s(side, folder) for side in sides} for _ in range(REPEATS)]
    print(f"{shards:,} shards of {images:,} images, {SIDE_PX} px")
    print("| work | CPU seconds | per 1,000 images |\n|---|---|---|")
    for side in sides:
        least = min(run[side] for run in runs)
        print(f"| {side.__name__} | {least:.2f} | {least / (shards * images) * 1000:.3f} |")


if __name__ == "__main__":
    given = [int(one) for one in sys.argv[1:]]
    main(*(given or [20, 1000]) if len(given) != 1 else (given[0], 1000))
