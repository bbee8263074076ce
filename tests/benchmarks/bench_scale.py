"""What each data stage costs as data grows: `bench_scale.py [--shards N] [--rows N] [--folder F]`.

Makes manifests of N shards (200,000), look-up tables and rows up to so many rows (20,000,000), of
made-up samples, 10,000 a shard, by the real code, at steps of ten below; measures each stage at
each size in a process of its own, in CPU seconds, so that other work on the machine does not
count; fits seconds = c n^p, and prints a Markdown table: the law, how well it fits, what it says
for 200,000 shards on one machine of 64 cores and on 50 of them. What is in F is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from evaclip_model.reading.config import SamplingConfig
from evaclip_model.reading.reader import BatchReader, ReadSettings
from evaclip_model.reading.samples import SHARDS, TOMBSTONES, ShardManifest
from tasks.dataset import choose, dataset
from tasks.dataset.config import DatasetConfig
from tasks.download.fetch_outcome import Outcome
from tasks.download.shards import FinishedShard, Ledger, PlannedShard, shard_files, verdict_file
from tasks.download.watch_progress import CounterReader, OutcomeCounter
from tasks.index import sample_index
from tasks.index.sample_index import INDEX, Kind, SampleIndex, read_verdicts
from tests.benchmarks.bench_trace import PER_SHARD, Invented, url_of, verdicts

PAPER_SHARDS = 200_000
CORES, MACHINES = 64, 50
TESTED = 500_000
"""Evaluation images, made up, that no sample may resemble."""
TAKEN_DOWN = 1_000
LEFT_OUT_SHARE = 0.3
BUSY = 8_000
"""Processes that download at once: 500 machines of 16."""
POLLS_A_SHARD = 0.04
"""Half-second polls for every shard that ends, at 50 of them a second: 500 machines of 1,000 URLs
a second, 10,000 a shard."""
MEMORY_LIMIT = "2GB"


@dataclass(frozen=True)
class Cost:
    """Of one stage at one size."""

    cpu_s: float
    wall_s: float
    peak_gb: float


@dataclass(frozen=True)
class Stage:
    what: str
    unit: str
    """"shards" or "rows"."""
    spread: str
    """What the work is shared by: "no" (one core), "cores" or "machines"."""
    limit: str
    run: Callable[[int, Path], float | None]
    """Does it for so many shards, in a folder; CPU seconds of its own preparing, which are taken
    off."""
    needs_index: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=PAPER_SHARDS)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", default="", help="stages whose names have this in them")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="evaclip-bench-scale-") as temporary:
        folder = arguments.folder or Path(temporary)
        bench(arguments.shards, arguments.rows, folder, arguments.only)


def bench(shards: int, rows: int, folder: Path, only: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    by_shard = [n for n in (200, 2_000, 20_000, 200_000) if n <= shards]
    most = rows // PER_SHARD
    by_row = sorted({max(20, most // part) for part in (100, 10, 4, 2, 1)})
    for stage in (one for one in STAGES if only in one.what):
        for size in by_shard if stage.unit == "shards" else by_row:
            kept = folder / f"{stage.what.replace(' ', '-').replace(',', '')}-{size}.json"
            if not kept.exists():
                if stage.needs_index:
                    measure(partial(make_missing, size, folder))
                cost = measure(partial(stage.run, size, folder))
                kept.write_text(json.dumps(asdict(cost)))
    print(table(folder))


def measure(work: Callable[[], float | None]) -> Cost:
    """Do it in a process of its own."""
    reading, writing = os.pipe()
    begin_s = time.monotonic()
    if (child := os.fork()) == 0:
        try:
            idle_s = work() or 0.0
            os.write(writing, struct.pack("d", idle_s))
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    os.close(writing)
    _, status, used = os.wait4(child, 0)
    if status:
        raise SystemExit("a stage failed")
    with os.fdopen(reading, "rb") as pipe:
        (idle_s,) = struct.unpack("d", pipe.read(8))
    cpu_s = used.ru_utime + used.ru_stime - idle_s
    return Cost(cpu_s, time.monotonic() - begin_s, used.ru_maxrss * 1024 / 1e9)


def table(folder: Path) -> str:
    """The laws of all that was measured, in Markdown."""
    lines = [
        "| stage | measured at | law, CPU s | R² | peak, GB | 200,000 shards: 1 machine of 64 cores"
        " | 50 machines | limit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for stage in STAGES:
        name = stage.what.replace(" ", "-").replace(",", "")
        found = {
            int(path.stem.rpartition("-")[2]): Cost(**json.loads(path.read_text()))
            for path in folder.glob(f"{name}-*.json")
        }
        if len(found) < 2:
            continue
        each = PER_SHARD if stage.unit == "rows" else 1
        sizes = sorted(found)
        base, constant, power, fits = fit_law(
            [n * each for n in sizes], [found[n].cpu_s for n in sizes]
        )
        whole_s = base + constant * (PAPER_SHARDS * each) ** power
        one = whole_s / (1 if stage.spread == "no" else CORES)
        fifty = one / (MACHINES if stage.spread == "machines" else 1)
        peaks = [found[n].peak_gb for n in sizes]
        lines.append(
            f"| {stage.what} | {sizes[0] * each:,} to {sizes[-1] * each:,} {stage.unit} "
            f"| {base:.2g} + {constant:.3g} n^{power:.2f} | {fits:.4f} "
            f"| {peaks[0]:.2f} to {peaks[-1]:.2f} | {said(one)} | {said(fifty)} | {stage.limit} |"
        )
    return "\n".join(lines)


def fit_law(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float, float, float]:
    """(a, c, p, R²) of seconds = a + c n^p, whose relative errors are least; a is not negative."""
    n, t = np.array(sizes, dtype=float), np.array(seconds)
    best = (0.0, 0.0, 1.0, -np.inf)
    for power in np.arange(0.0, 2.51, 0.01) if len(n) > 2 else (1.0,):
        shape = np.stack([np.ones_like(n), n**power], axis=1) / t[:, None]
        base, constant = np.linalg.lstsq(shape, np.ones_like(n), rcond=None)[0]
        if base < 0 or constant < 0:
            base, constant = 0.0, float((n**power / t).sum() / ((n**power / t) ** 2).sum())
        left = t - base - constant * n**power
        fits = 1 - float((left**2).sum() / ((t - t.mean()) ** 2).sum())
        if fits > best[3]:
            best = (float(base), float(constant), float(power), fits)
    return best


def said(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def rows_at(shards: int, folder: Path) -> Path:
    """The folder of the index of so many shards."""
    return folder / f"verified-{shards}"


def make_missing(shards: int, folder: Path) -> None:
    """Make that index if it is not there, before anything is measured on it."""
    if not (rows_at(shards, folder) / "made").exists():
        make_index(shards, folder)


def make_index(shards: int, folder: Path) -> float:
    """Index the made-up samples; CPU seconds of making them up."""
    begun, verified = time.process_time(), folder / f"verified-{shards}"
    invented = Invented(shards * PER_SHARD, narrow=True)
    tables = invented.tables(folder / f"tables-{shards}")
    spent = time.process_time() - begun
    sample_index.write_index(tables, verified / INDEX, MEMORY_LIMIT)
    shutil.rmtree(folder / f"tables-{shards}")
    sample_index.write_verdicts(list(verdicts(invented.shards)), verified)
    (verified / "made").touch()
    return spent


def join_week(shards: int, folder: Path) -> None:
    """Join what there is and a hundredth more, as every week does; look-ups alone are written."""
    all_sizes = sorted(int(path.name.rpartition("-")[2]) for path in folder.glob("verified-*"))
    old, new = rows_at(shards, folder), rows_at(all_sizes[0], folder)
    joined = folder / f"joined-{shards}"
    parts = [(old, 0, 0), (new, shards * PER_SHARD, shards)]
    sample_index.join_indexes(parts, joined)
    for path in joined.rglob("*.parquet"):
        path.unlink()


def obey_rules(shards: int, folder: Path) -> None:
    """Flaws, shards and evaluation images by their looks, in one pass over all rows."""
    verified = rows_at(shards, folder)
    index, found = SampleIndex(verified), read_verdicts(verified)
    tested = np.random.default_rng(1).integers(0, 2**63, TESTED, dtype=np.uint64)
    choice = choose.Choice(index.rows)
    choose._go_through(index, found, DatasetConfig(), tested, choice)


def find_copies(shards: int, folder: Path) -> None:
    index = SampleIndex(rows_at(shards, folder), MEMORY_LIMIT)
    for kind in (Kind.UID, Kind.HASH):
        taken = np.zeros(index.rows, dtype=np.bool_)
        for rows, groups, first in index.find_repeated(kind, np.ones_like(taken)):
            choose._find_later(rows, groups, first, taken)


def find_alike(shards: int, folder: Path) -> None:
    """Near duplicates among as many hashes, a hundredth of them of one picture."""
    rng = np.random.default_rng(2)
    looks = rng.integers(0, 2**63, shards * PER_SHARD, dtype=np.uint64)
    alike = rng.choice(len(looks), min(8_000, len(looks) // 100), replace=False)
    flips = rng.integers(0, 64, (2, len(alike)), dtype=np.uint64)
    looks[alike] = looks[0] ^ (np.uint64(1) << flips[0]) ^ (np.uint64(1) << flips[1])
    choose._later_looks(looks, 4, np.arange(len(looks)))


def find_takedowns(shards: int, folder: Path) -> None:
    index = SampleIndex(rows_at(shards, folder), MEMORY_LIMIT)
    asked = [url_of(n) for n in range(0, index.rows, index.rows // TAKEN_DOWN)][:TAKEN_DOWN]
    assert len(choose.find_asked(index, {Kind.URL: tuple(asked)})) >= TAKEN_DOWN


def write_manifest(shards: int, folder: Path) -> float:
    """The part of a version that is a line a shard: counts, tombstones, `shards.json`."""
    begun = time.process_time()
    rng = np.random.default_rng(3)
    found = list(verdicts([PER_SHARD] * shards))
    choice = choose.Choice(shards * PER_SHARD)
    left_out = rng.random(PER_SHARD * 1_000) < LEFT_OUT_SHARE
    for first in range(0, shards * PER_SHARD, len(left_out)):
        part = np.flatnonzero(left_out[: shards * PER_SHARD - first]) + first
        choice.leave_out(part, choose.LeftOutReason.EXACT_DUPLICATE)
    prepared = time.process_time() - begun
    out = folder / f"dataset-{shards}"
    out.mkdir(exist_ok=True)
    with (out / TOMBSTONES).open("wb") as bits:
        kept, _ = dataset._keep_shards(found, folder / "verified", choice, bits, choice.left_out)
    ShardManifest(shards=kept).write(out / SHARDS)
    return prepared


def start_rank(shards: int, folder: Path) -> None:
    """All that a rank does before its first batch, whatever its number."""
    config = SamplingConfig(image_px=224, global_batch=131_072, lanes=256)
    reader = BatchReader(
        folder / f"dataset-{shards}" / SHARDS, config, rank=3, ranks=256, settings=ReadSettings()
    )
    reader.close()


def count_shards(shards: int, folder: Path) -> float:
    """What the coordinator of a download does for so many shards, of which others are the makers:
    polls among thousands of busy processes, and a look at every shard that ended."""
    begun = time.process_time()
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        place = Path(temporary)
        (place / "shards").mkdir()
        outcomes = Counter({Outcome.SUCCESS: 6_000, Outcome.NOT_FOUND: 4_000})
        planned = [PlannedShard(number, "laion2b", PER_SHARD) for number in range(shards)]
        for number in range(BUSY):
            with suppress(ValueError):
                OutcomeCounter(place, PAPER_SHARDS + number)
        for one in planned:
            files = shard_files(place / "shards", one)
            for path in files:
                path.touch()
            with OutcomeCounter(place, one.number):
                pass
            stamp = [(path.stat().st_size, path.stat().st_mtime_ns) for path in files]
            maker = Ledger(verdict_file(place, one.number), place / "shards")
            maker._remember(FinishedShard(one, outcomes, 1, 0.0), stamp)
        prepared = time.process_time() - begun
        ledger, reader = Ledger(place / "checked.jsonl", place / "shards"), CounterReader(place)
        reader.read_counts()
        for number in reader.take_finished():
            ledger.take_verdict(verdict_file(place, number))
            ledger.check_planned(planned[number])
        for _ in range(round(POLLS_A_SHARD * shards)):
            reader.read_counts()
        begun = time.process_time()
    return prepared + time.process_time() - begun


STAGES = (
    Stage("index", "rows", "cores", "CPU and disk, one machine", make_index),
    Stage("join of a week", "rows", "cores", "CPU and disk, one machine", join_week, True),
    Stage("rules, 500,000 test images", "rows", "cores", "CPU, one machine", obey_rules, True),
    Stage("exact duplicates", "rows", "cores", "CPU and disk, one machine", find_copies, True),
    Stage("near duplicates", "rows", "no", "memory, one core", find_alike),
    Stage(
        "takedown of 1,000 URLs", "rows", "cores", "disk: one row group a URL", find_takedowns, True
    ),
    Stage("manifest of a version", "shards", "no", "one core", write_manifest),
    Stage("start of a rank", "shards", "no", "one core, memory", start_rank),
    Stage("coordinator of a download", "shards", "no", "one core", count_shards),
)


if __name__ == "__main__":
    main()
