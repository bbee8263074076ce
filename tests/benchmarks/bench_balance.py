"""How fast, and in how much memory, a merge balances, beside MetaCLIP's rule in plain Python.

    python tests/benchmarks/bench_balance.py [--rows 20_000_000] [--sample 200_000] [--workers 2]

Covers: made-up captions of 3 to 13 words, whose frequencies fall with their rank as a language's do
(200,000 words), half a million entries of one to four words, 20,000 rows an entry for 1.6 billion
(`--t` for another). The same merge runs without and with balancing, each in a process of its own
with so many workers of one thread, as a flow's tasks; the difference is what balancing costs.
CPU-seconds are those of all of them, user and system, the peak is the largest process's. A sample
of captions is judged in plain Python, by the rule as MetaCLIP first published it (every entry is
looked for in the caption; a thousandth of the sample) and as it does now (an automaton of
pyahocorasick; left out where that is not installed): spaces around marks, entries between spaces, a
draw an entry. With the merge's counts and draws all must keep the very rows that the merge kept.
Not here: correctness in small; see tests/tasks/merge.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import duckdb

from tasks.merge.config import MergeConfig
from tasks.merge.merge import merge_sources
from tasks.merge.units import Chunk, run_chunk
from tests.tasks.merge.reference import draw

WORDS = 200_000
ENTRIES = 500_000
SPAWN = multiprocessing.get_context("spawn")
ROWS = """
SELECT i AS id, 'https://h' || hash(i) % 5000 || '.example.com/' || i || '.jpg' AS url,
  array_to_string(list_transform(range(3 + (hash(i) % 11)::BIGINT), lambda place:
    'w' || pow($words, (hash(i * 31 + place) % 1000000) / 1e6)::BIGINT ||
    CASE WHEN hash(i * 37 + place) % 12 = 0 THEN ',' ELSE '' END), ' ') AS caption
FROM range($first, $last) AS numbers(i)
"""


def write_metadata(folder: Path, rows: int, files: int = 8) -> list[Path]:
    found = [folder / f"{number}.parquet" for number in range(files)]
    for number, path in enumerate(found):
        if path.is_file():
            continue
        bounds = {"first": rows * number // files, "last": rows * (number + 1) // files}
        with duckdb.connect() as connection:
            connection.execute(
                f"COPY ({ROWS}) TO $path (FORMAT parquet, CODEC zstd)",
                {**bounds, "words": WORDS, "path": str(path)},
            )
    return found


def write_entries(path: Path) -> list[str]:
    """The most frequent words, then runs of two to four words of captions like those."""
    made, draws = dict.fromkeys(f"w{rank}" for rank in range(1, ENTRIES // 5)), random.Random(0)
    while len(made) < ENTRIES:
        words = (round(WORDS ** draws.random()) for _ in range(draws.choice((2, 2, 3, 4))))
        made[" ".join(f"w{word}" for word in words)] = None
    path.write_text(json.dumps(list(made)))
    return list(made)


def in_processes(chunks: Sequence[Chunk]) -> Iterator[int]:
    """The merge's chunks side by side, each in a process of its own."""
    if chunks:
        with ProcessPoolExecutor(len(chunks), SPAWN, initializer=os.setsid) as pool:
            for done in as_completed([pool.submit(work_through, chunk) for chunk in chunks]):
                yield from done.result()


def work_through(chunk: Chunk) -> list[int]:
    return list(run_chunk(chunk))


def merge_here(folder: Path, t: int, workers: int, memory: str) -> dict[str, float]:
    """One merge by this process and its workers; `t` = 0: without balancing."""
    balance = {"t": t, "entries": str(folder / "entries.json")} if t else None
    source = {"name": "made", "files": str(folder / "*.parquet")}
    settings = {"sources": [source], "memory_limit": memory, "balance": balance}
    config = MergeConfig.from_mapping(settings, where="benchmark")
    out = folder / f"out-{t}"
    out.mkdir()
    wall = time.perf_counter()
    files = {"made": sorted(folder.glob("*.parquet"))}
    made = merge_sources(*(config, files, out, _show), threads=1, run=in_processes, chunks=workers)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "cpu_s": sum(one.ru_utime + one.ru_stime for one in used),
        "wall_s": time.perf_counter() - wall,
        "peak_gb": max(one.ru_maxrss for one in used) / 1024**2,
        "selected": made.counts["selected"],
    }


def _show(done: float, total: float, detail: str = "") -> None:
    print(f"\r{done / total:4.0%} {detail:30}", end="", file=sys.stderr, flush=True)


def space_marks(caption: str) -> str:
    spaced = f" {caption} "
    for mark in ",.;:?!`":
        spaced = spaced.replace(mark, f" {mark} ")
    return spaced


def substring_rule(entries: Sequence[str]) -> Callable[[str], set[str]]:
    spaced = [(entry, f" {entry} ") for entry in entries]

    def find(caption: str) -> set[str]:
        text = space_marks(caption)
        return {entry for entry, between in spaced if between in text}

    return find


def automaton_rule(entries: Sequence[str]) -> Callable[[str], set[str]]:
    import ahocorasick

    automaton = ahocorasick.Automaton()
    for entry in entries:
        automaton.add_word(f" {entry} ", entry)
    automaton.make_automaton()
    return lambda caption: {entry for _, entry in automaton.iter(space_marks(caption))}


def judge_sample(
    find: Callable[[str], set[str]],
    sample: Sequence[tuple[str, str]],
    counts: dict[str, int],
    t: int,
) -> tuple[float, set[str]]:
    """(rows per CPU-second of matching, counting and drawing with random numbers, as published;
    uids that stay with our draws)."""
    begun, seen = time.process_time(), dict.fromkeys(counts, 0)
    held = {uid: find(caption) for uid, caption in sample}
    for found in held.values():
        for entry in found:
            seen[entry] += 1
    for found in held.values():
        any(random.random() < t / max(t, seen[entry]) for entry in found)
    rate = len(sample) / (time.process_time() - begun)
    return rate, {u for u, one in held.items() if any(draw(u, e) * counts[e] < t for e in one)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rows", type=int, default=20_000_000)
    options.add_argument("--sample", type=int, default=200_000)
    options.add_argument("--t", type=int)
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--memory", default="1GB", help="database's limit")
    options.add_argument("--scratch", type=Path, help="folder for data and spill")
    options.add_argument("--data", type=Path, help="folder that keeps the metadata for other runs")
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = options.parse_args()
    t = arguments.t if arguments.t is not None else max(1, 20_000 * arguments.rows // 1_600_000_000)
    if arguments.folder:
        found = merge_here(arguments.folder, t, arguments.workers, arguments.memory)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as made_now:
        name = str(arguments.data or made_now)
        folder = Path(name)
        write_metadata(folder, arguments.rows)
        entries = write_entries(folder / "entries.json")
        runs = {}
        for which in (0, t):
            command = [sys.executable, __file__, "--folder", name, "--t", str(which)]
            command += ["--workers", str(arguments.workers), "--memory", arguments.memory]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs[which] = json.loads(done.stdout.splitlines()[-1])
            print(which, runs[which], flush=True)
            if which == 0:
                sample = duckdb.sql(
                    f"SELECT uid, caption FROM '{name}/out-0/made/*.parquet' "
                    f"ORDER BY uid LIMIT {arguments.sample}"
                ).fetchall()
                for path in (folder / "out-0").rglob("*.parquet"):
                    path.unlink()
        cost = runs[t]["cpu_s"] - runs[0]["cpu_s"]
        rate = runs[0]["selected"] / cost
        kept = {
            uid
            for (uid,) in duckdb.sql(f"SELECT uid FROM '{name}/out-{t}/made/*.parquet'").fetchall()
        }
        counts = json.loads((folder / f"out-{t}" / "entries.json").read_text())
        report = json.loads((folder / f"out-{t}" / "report.json").read_text())["balance"]
    print({key: value for key, value in report.items() if key != "most_frequent"})
    print(f"without balancing {runs[0]}\nwith t = {t} {runs[t]}")
    whole = arguments.rows / runs[t]["cpu_s"]
    print(f"balancing: {rate:,.0f} rows per CPU-second; merge and balancing: {whole:,.0f}")
    rules = {"every entry looked for": (substring_rule, max(1, len(sample) // 1_000))}
    if importlib.util.find_spec("ahocorasick"):
        rules["Aho-Corasick automaton"] = (automaton_rule, len(sample))
    for label, (rule, rows) in rules.items():
        theirs, stay = judge_sample(rule(entries), sample[:rows], counts, t)
        equal = stay == {uid for uid, _ in sample[:rows]} & kept
        print(
            f"plain Python, {label}: {theirs:,.0f} rows per CPU-second ({rows:,} rows), ours "
            f"{rate / theirs:,.1f} times; {len(stay):,} stay, the same rows: {equal}"
        )


if __name__ == "__main__":
    main()
