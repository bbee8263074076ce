"""Trace and takedown on a large index: `bench_trace.py [SAMPLES ...] [--folder FOLDER] [--narrow]`.

Invents the samples of a verification (10 million by default, 0.17 GB a million in FOLDER and as
much again for a moment), makes index and dataset version with the real code, and runs the real
commands, each in a process of its own. Prints a Markdown table a size. What is there already in
FOLDER is used again.

With --narrow hashes hold 64 random bits, written several times: rows take half the disk, and the
look-up tables, marks and row groups are those of the full width.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from evaclip_model.reading.samples import Shard
from tasks.artifacts.artifact import Address, Artifact, Made, produce_artifact
from tasks.dataset.config import STAGE as DATASET, DatasetConfig, OutsideFiles
from tasks.dataset.dataset import Takedowns, make_dataset
from tasks.download.config import STAGE as DOWNLOAD, DownloadConfig
from tasks.index.sample_index import (
    CHECKED,
    COLUMNS,
    INDEX,
    ShardVerdict,
    write_index,
    write_verdicts,
)
from tasks.merge.config import STAGE as MERGE, MergeConfig, SourceConfig
from tasks.progress import report_nothing
from tasks.verify.config import STAGE as VERIFY, VerifyConfig

PER_SHARD = 10_000
TAKEN_DOWN = 1_000
REPEATS = 3
MERGED = MergeConfig(sources=(SourceConfig(name="laion2b", files="invented"),))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("samples", type=int, nargs="*", default=[10_000_000])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--narrow", action="store_true")
    arguments = parser.parse_args()
    for samples in arguments.samples:
        invented = Invented(samples, arguments.narrow)
        if arguments.folder:
            bench(invented, arguments.folder / f"{samples}{'-narrow' * arguments.narrow}")
            continue
        with tempfile.TemporaryDirectory(prefix="evaclip-bench-trace-") as folder:
            bench(invented, Path(folder))


def bench(invented: Invented, folder: Path) -> None:
    """Make everything, time everything, print a table."""
    root, samples = folder / "runs", invented.samples
    rows: list[tuple[str, float, float]] = []
    verified = prepare(invented, root, rows)
    example = invented.names(samples // 2)
    for option in ("uid", "url", "sha256"):
        command = ["trace", f"--{option}", example[option]]
        rows.extend((f"flows trace --{option}", *run(command, root)) for _ in range(REPEATS))
    requests = folder / "requests.txt"
    step = max(1, samples // TAKEN_DOWN)
    wanted = range(0, samples, step)
    requests.write_text("".join(f"{url_of(number)}\n" for number in wanted))
    rows.append((f"flows takedown, {len(wanted):,} URLs", *run(["takedown", str(requests)], root)))
    index = sum(path.stat().st_size for path in (verified.folder / INDEX).rglob("*.parquet"))
    print(f"{samples:,} samples in {len(invented.shards):,} shards\n")
    print("| step | wall, s | CPU, s |\n|---|---|---|")
    for name, wall, cpu in rows:
        print(f"| {name} | {wall:.2f} | {cpu:.2f} |")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\nindex: {index / samples:.0f} bytes a sample; peak memory of making it {peak:.2f} GiB")


def prepare(invented: Invented, root: Path, rows: list[tuple[str, float, float]]) -> Artifact:
    """Finished artifacts from merge to a dataset version; the verification is returned."""
    samples = invented.samples
    merged = produce_artifact(
        Address.of(root, MERGE, MERGED),
        lambda _: Made({"rows_read": samples, "selected": samples}, ()),
    )
    downloaded = produce_artifact(
        Address.of(root, DOWNLOAD, DownloadConfig(), {"merge": merged.digest}),
        lambda _: Made({"rows": samples, "samples": samples}, ()),
    )
    config = VerifyConfig()

    def verify(out: Path) -> Made:
        before = time.monotonic(), time.process_time()
        write_index(invented.tables(out / "tables"), out / INDEX, config.memory_limit)
        shutil.rmtree(out / "tables")
        made = (time.monotonic() - before[0], time.process_time() - before[1])
        rows.append(("index, and inventing its samples", *made))
        write_verdicts(list(verdicts(invented.shards)), out)
        return Made({"samples": samples}, (out / CHECKED,))

    verified = produce_artifact(
        Address.of(root, VERIFY, config, {"download": downloaded.digest}), verify
    )
    rules = DatasetConfig()
    before = time.monotonic(), time.process_time()
    produce_artifact(
        Address.of(root, DATASET, rules, {"verify": verified.digest}),
        lambda out: make_dataset(
            rules, (merged, downloaded, verified), OutsideFiles(), Takedowns(), out, report_nothing
        ),
    )
    made = (time.monotonic() - before[0], time.process_time() - before[1])
    rows.append(("dataset version, exact duplicates left out", *made))
    return verified


def url_of(number: int) -> str:
    """Where an invented sample came from."""
    return f"https://host{number % 50_000}.example/a/path/as/long/as/usual/image-{number}.jpg"


@dataclass(frozen=True)
class Invented:
    """The samples of a verification; one in ten has the image of the one before."""

    samples: int
    narrow: bool
    """Hashes of 64 random bits instead of all."""

    @property
    def shards(self) -> list[int]:
        """Samples of every shard."""
        whole, rest = divmod(self.samples, PER_SHARD)
        return [PER_SHARD] * whole + [rest] * bool(rest)

    def names(self, number: int) -> dict[str, str]:
        """What one of them can be looked up by."""
        shard, place = divmod(number, PER_SHARD)
        hashes = self._hashes(shard)
        return {name: column[place].as_py() for name, column in hashes.items()} | {
            "url": url_of(number)
        }

    def tables(self, folder: Path) -> list[Path]:
        """What looking at shards leaves: a table a shard, in a new folder."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        files = [folder / f"{shard:06d}.parquet" for shard in range(len(self.shards))]
        for shard, path in enumerate(files):
            pq.write_table(self._table(shard), path, compression="zstd")
        return files

    def _table(self, shard: int) -> pa.Table:
        size, first = self.shards[shard], shard * PER_SHARD
        numbers = range(first, first + size)
        hashes = self._hashes(shard)
        columns: dict[str, Any] = {
            **hashes,
            "url": [url_of(number) for number in numbers],
            "key": [f"{number:010d}" for number in numbers],
            "source": ["laion2b"] * size,
            "original_id": list(map(str, numbers)),
            "md5": pc.utf8_slice_codeunits(hashes["stored_sha256"], 0, 32),
            "phash": np.random.default_rng(shard).integers(0, 2**63, size, dtype=np.uint64),
            "flaw": pa.nulls(size, pa.string()),
        }
        return pa.table(columns, schema=COLUMNS)

    def _hashes(self, shard: int) -> dict[str, pa.Array]:
        """The uid, and the hashes of image and stored image, of every sample of a shard."""
        size, rng = self.shards[shard], np.random.default_rng([shard, self.narrow])
        places = np.arange(size)
        images = np.where(places % 10 == 9, places - 1, places)
        return {
            "uid": _in_hex(rng, places, 16, 16),
            "sha256": _in_hex(rng, images, 32, 8 if self.narrow else 32),
            "stored_sha256": _in_hex(rng, images, 32, 8 if self.narrow else 32),
        }


def _in_hex(rng: np.random.Generator, chosen: np.ndarray, width: int, different: int) -> pa.Array:
    """Strings in hex of `width` bytes, of which `different` are random; a row a chosen place."""
    drawn = rng.integers(0, 256, (len(chosen), different), dtype=np.uint8)[chosen]
    text = np.tile(drawn, width // different).tobytes().hex().encode()
    offsets = np.arange(len(chosen) + 1, dtype=np.int32) * (2 * width)
    buffers = (pa.py_buffer(offsets), pa.py_buffer(text))
    return pa.StringArray.from_buffers(len(chosen), *buffers)


def verdicts(shards: Sequence[int]) -> Iterator[ShardVerdict]:
    """Every shard is whole; none of them exists."""
    for number, size in enumerate(shards):
        path = f"../../download/shards/{number:06d}.tar"
        shard = Shard(path=path, source="laion2b", samples=size, bytes=size, sha256="0" * 64)
        yield ShardVerdict(path=path, stored=size, shard=shard, flaws={}, left_out=None)


def run(command: list[str], root: Path) -> tuple[float, float]:
    """Wall and CPU seconds of `python -m flows COMMAND`, start of Python and imports included."""
    before = time.monotonic(), _children()
    subprocess.run(
        [sys.executable, "-m", "flows", *command],
        env={**os.environ, "EVACLIP_ROOT": str(root)},
        cwd=Path(__file__).parents[2],
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return time.monotonic() - before[0], _children() - before[1]


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
