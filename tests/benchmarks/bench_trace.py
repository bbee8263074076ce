"""Trace and takedown on a large index: `bench_trace.py [SAMPLES] [--folder FOLDER]`.

Invents the samples of a verification (10 million by default, about 0.2 GB a million in FOLDER),
makes index and dataset version with the real code, and runs the real commands, each in a process of
its own. Prints Markdown. What is there already in FOLDER is used again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from evaclip_model.reading.samples import Shard
from tasks.artifact import Address, Artifact, Made, produce
from tasks.checked_shards import CHECKED, Verdict, write_verdicts
from tasks.dataset.config import STAGE as DATASET
from tasks.dataset.config import DatasetConfig
from tasks.dataset.dataset import OutsideFiles, Takedowns, make_dataset
from tasks.download.config import STAGE as DOWNLOAD
from tasks.download.config import DownloadConfig
from tasks.merge.config import STAGE as MERGE
from tasks.merge.config import MergeConfig, SourceConfig
from tasks.progress import silent
from tasks.sample_index import COLUMNS, INDEX, write_index
from tasks.verify.config import STAGE as VERIFY
from tasks.verify.config import VerifyConfig

PER_SHARD = 10_000
TAKEN_DOWN = 1_000
REPEATS = 3
MERGED = MergeConfig(sources=(SourceConfig(name="laion2b", files="invented"),))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("samples", type=int, nargs="?", default=10_000_000)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.folder:
        bench(arguments.samples, arguments.folder)
        return
    with tempfile.TemporaryDirectory(prefix="evaclip-bench-trace-") as folder:
        bench(arguments.samples, Path(folder))


def bench(samples: int, folder: Path) -> None:
    """Make everything, time everything, print a table."""
    root = folder / "runs"
    rows: list[tuple[str, float, float]] = []
    verified = prepare(samples, root, rows)
    example = sample(samples // 2)
    for option in ("uid", "url", "sha256"):
        command = ["trace", f"--{option}", example[option]]
        rows.extend((f"flows trace --{option}", *run(command, root)) for _ in range(REPEATS))
    requests = folder / "requests.txt"
    step = max(1, samples // TAKEN_DOWN)
    wanted = range(0, samples, step)
    requests.write_text("".join(f"{sample(number)['url']}\n" for number in wanted))
    rows.append((f"flows takedown, {len(wanted):,} URLs", *run(["takedown", str(requests)], root)))
    index = sum(path.stat().st_size for path in (verified.folder / INDEX).rglob("*.parquet"))
    print(f"{samples:,} samples in {len(shard_sizes(samples)):,} shards\n")
    print("| step | wall, s | CPU, s |\n|---|---|---|")
    for name, wall, cpu in rows:
        print(f"| {name} | {wall:.2f} | {cpu:.2f} |")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\nindex: {index / samples:.0f} bytes a sample; peak memory of making it {peak:.2f} GiB")


def prepare(samples: int, root: Path, rows: list[tuple[str, float, float]]) -> Artifact:
    """Finished artifacts from merge to a dataset version; the verification is returned."""
    merged = produce(
        Address.of(root, MERGE, MERGED),
        lambda _: Made({"rows_read": samples, "selected": samples}, ()),
    )
    downloaded = produce(
        Address.of(root, DOWNLOAD, DownloadConfig(), {"merge": merged.digest}),
        lambda _: Made({"rows": samples, "samples": samples}, ()),
    )
    config = VerifyConfig()

    def verify(out: Path) -> Made:
        tables = list(write_tables(samples, out / "tables"))
        before = time.monotonic(), time.process_time()
        write_index(tables, out / INDEX, config.memory_limit)
        rows.append(("index", time.monotonic() - before[0], time.process_time() - before[1]))
        write_verdicts(list(verdicts(samples)), out)
        return Made({"samples": samples}, (out / CHECKED,))

    verified = produce(Address.of(root, VERIFY, config, {"download": downloaded.digest}), verify)
    rules = DatasetConfig()
    before = time.monotonic(), time.process_time()
    produce(
        Address.of(root, DATASET, rules, {"verify": verified.digest}),
        lambda out: make_dataset(
            rules, (merged, downloaded, verified), OutsideFiles(), Takedowns(), out, silent
        ),
    )
    made = (time.monotonic() - before[0], time.process_time() - before[1])
    rows.append(("dataset version, exact duplicates left out", *made))
    return verified


def sample(number: int) -> dict[str, str]:
    """The names of an invented sample; one in ten has the image of the one before."""
    image = number - 1 if number % 10 == 9 else number
    hashes = hashlib.sha512(b"image %d" % image).hexdigest()
    return {
        "uid": hashlib.md5(b"row %d" % number).hexdigest(),
        "url": f"https://host{number % 50_000}.example/a/path/as/long/as/usual/image-{number}.jpg",
        "sha256": hashes[:64],
        "stored_sha256": hashes[64:],
    }


def write_tables(samples: int, folder: Path) -> Iterator[Path]:
    """What looking at shards leaves: a table a shard."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(shard_sizes(samples)):
        rows = [sample(number * PER_SHARD + place) for place in range(size)]
        columns: dict[str, Any] = {
            name: [row[name] for row in rows] for name in ("uid", "url", "sha256", "stored_sha256")
        }
        columns |= {
            "key": [f"{number * PER_SHARD + place:010d}" for place in range(size)],
            "source": ["laion2b"] * size,
            "original_id": [str(number * PER_SHARD + place) for place in range(size)],
            "md5": [row["stored_sha256"][:32] for row in rows],
            "phash": np.random.default_rng(number).integers(0, 2**63, size, dtype=np.uint64),
            "flaw": pa.nulls(size, pa.string()),
        }
        path = folder / f"{number:06d}.parquet"
        pq.write_table(pa.table(columns, schema=COLUMNS), path, compression="zstd")
        yield path


def verdicts(samples: int) -> Iterator[Verdict]:
    """Every shard is whole; none of them exists."""
    for number, size in enumerate(shard_sizes(samples)):
        path = f"../../download/shards/{number:06d}.tar"
        shard = Shard(path=path, source="laion2b", samples=size, bytes=size, sha256="0" * 64)
        yield Verdict(path=path, stored=size, shard=shard, flaws={}, left_out=None)


def shard_sizes(samples: int) -> list[int]:
    """Samples of every shard."""
    whole, rest = divmod(samples, PER_SHARD)
    return [PER_SHARD] * whole + [rest] * bool(rest)


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
