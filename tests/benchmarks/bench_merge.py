"""How fast, and in how much memory, a merge runs: ours, and the plain ways to write it.

    python tests/benchmarks/bench_merge.py [--rows 5_000_000 10_000_000 20_000_000] [--threads 2]
    python tests/benchmarks/bench_merge.py --rows 5_000_000 --memory 4GB \
        --ways ours "DuckDB window" --results figures.jsonl

Covers: LAION-like (76 %) and COYO-like (24 %) rows in the published columns with the published
faults (duplicates within and across the sources, http beside https, upper-case hosts, fragments,
letters that need escapes); DuckDB's GROUP BY and window, polars and pandas beside ours.
Not here: correctness; see tests/tasks/merge.

Everyone filters by the same rules, normalises, keeps the same row of every address, and writes the
same rows with the same uid in the same order, zstd-compressed at the same level; a digest over the
rows in order is compared. DuckDB's forms use the very text of our normalisation and rules, write
with its own writer, and name the other sources that have a row (`also_in`) as ours does; polars
and pandas do not. What only ours does, at its own cost: counts of every reason a row is dropped
for, files of 10,000 rows, and units that a killed run need not repeat.

Every run is a process of its own; runs take turns, a whole round after the other. CPU-seconds are
the process's own, user and system; spill is the largest size of the database's temporary folder,
temp of everything temporary. What is not installed is named and left out. With `--results` every
run is a line in that file, and a run that has its line is not done again.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb

from tasks.merge.config import MergeConfig
from tasks.merge.database import execute_query, load_statement, open_database
from tasks.merge.filters import reason_expression, rule_parameters
from tasks.merge.merge import merge_sources
from tasks.merge.merge_plan import make_plan
from tests.tasks.merge.reference import address_and_url, tidy

ROWS = """
WITH numbers AS (
  SELECT i, (hash(i * 7 + $salt) % ($rows * 88 // 100))::BIGINT AS image FROM range($rows) t(i)
), addressed AS (
  SELECT i, CASE WHEN image % 100 < $shared THEN 'shared' ELSE $name END || image AS name,
    image % 100 AS kind, hash(i) % 1000 AS draw FROM numbers
)
SELECT i AS id,
  CASE WHEN kind < 50 THEN 'http' ELSE 'https' END || '://' ||
  CASE WHEN draw < 10 THEN 'WWW.Host' ELSE 'www.host' END || (hash(name) % 5000) ||
  '.example.com/wp-content/uploads/2019/07/' || md5(name) ||
  CASE WHEN draw < 40 THEN '/bücher und mehr' WHEN draw < 140 THEN '%20a' ELSE '' END || '.jpg' ||
  CASE WHEN draw > 980 THEN '#top' ELSE '' END AS url,
  'A caption about ' || md5(i::VARCHAR) || ' in sixty characters' AS text,
  (200 + hash(i + 1) % 1000)::INTEGER AS width, (200 + hash(i + 2) % 1000)::INTEGER AS height,
  0.2 + (hash(i + 3) % 1000) / 5000.0 AS similarity, (hash(i + 4) % 1000) / 1000.0 AS score
FROM addressed
"""
LAION = (
    "SELECT id AS SAMPLE_ID, url AS URL, text AS TEXT, height AS HEIGHT, width AS WIDTH, "
    "'?' AS LICENSE, CASE WHEN score > 0.97 THEN 'NSFW' ELSE 'UNLIKELY' END AS NSFW, similarity"
)
COYO = (
    "SELECT id, url, text, width, height, '0' AS image_phash, 68 AS text_length, 6 AS word_count, "
    "8 AS num_tokens_bert, 7 AS num_tokens_gpt, 0 AS num_faces, similarity AS "
    "clip_similarity_vitb32, similarity AS clip_similarity_vitl14, score / 2 AS "
    "nsfw_score_opennsfw2, score / 2 AS nsfw_score_gantman, score AS watermark_score, "
    "5.0 AS aesthetic_score_laion_v2"
)
WEB_SCALE = 2_700_000_000
NORMAL_URL = r"^https?://[a-z0-9._\-]+/[A-Za-z0-9\-._~!$&'()*+,;=:@/?]*$"
MESSY_CAPTION = r"^ | $|  |[^ -~]"
OUTPUT = ("uid", "source", "url", "caption", "original_id", "similarity", "width_hint")
Files = Mapping[str, Sequence[Path]]


def write_metadata(folder: Path, rows: int, files: int) -> dict[str, list[Path]]:
    """Synthetic metadata; `files` parquet files a source."""
    found: dict[str, list[Path]] = {}
    for salt, (name, columns, share) in enumerate((("laion", LAION, 76), ("coyo", COYO, 24))):
        found[name] = [folder / f"{name}-{part}.parquet" for part in range(files)]
        for part, path in enumerate(found[name]):
            if path.is_file():
                continue
            # A connection a file: generating many rows keeps memory that is not the merge's.
            with duckdb.connect() as connection:
                connection.execute(
                    f"COPY ({columns} FROM ({ROWS}) ORDER BY id) TO $path (FORMAT parquet)",
                    {
                        "rows": rows * share // 100 // files,
                        "salt": salt * 1_000 + part,
                        "shared": 6,
                        "name": f"{name}{part}",
                        "path": str(path),
                    },
                )
    return found


def configured(files: Files, memory: str) -> MergeConfig:
    """Default rules, every row selected."""
    sources = [{"name": source, "files": "-", "own_rows": True} for source in files]
    return MergeConfig.from_mapping({"sources": sources, "memory_limit": memory}, where="benchmark")


def with_ours(files: Files, out: Path, memory: str, threads: int) -> None:
    merge_sources(configured(files, memory), files, out, threads=threads)


def with_group_by(files: Files, out: Path, memory: str, threads: int) -> None:
    """The row that stays is the least of its address: what plain SQL says first."""
    _in_one_statement(
        *(files, out, memory, threads),
        "SELECT unnest(arg_min(kept, (source, -similarity, original_id, file, row_in_file))), "
        "bit_or(1::BIGINT << source) AS everyone "
        "FROM (SELECT address, source, similarity, original_id, file, row_in_file, {"
        "'source': source, 'address': address, 'url': url, 'caption': caption, 'original_id': "
        "original_id, 'similarity': similarity, 'width': width, 'height': height} AS kept "
        "FROM passing) GROUP BY address",
    )


def with_window(files: Files, out: Path, memory: str, threads: int) -> None:
    """The first row of each address in a window."""
    _in_one_statement(
        *(files, out, memory, threads),
        "SELECT source, address, url, caption, original_id, similarity, width, height, "
        "bit_or(1::BIGINT << source) OVER (PARTITION BY address) AS everyone "
        "FROM passing QUALIFY row_number() OVER (PARTITION BY address ORDER BY source, "
        "similarity DESC NULLS LAST, original_id NULLS LAST, file, row_in_file) = 1",
    )


def _in_one_statement(files: Files, out: Path, memory: str, threads: int, deduped: str) -> None:
    config = configured(files, memory)
    plan = make_plan(config, files, out, threads, memory)
    published = " UNION ALL ".join(
        f"SELECT {file.source} AS source, {file.number} AS file, file_row_number AS row_in_file, "
        f"{file.columns} FROM read_parquet('{file.path}', file_row_number = true)"
        for file in plan.files
    )
    reason = reason_expression(config.filters)
    for name in files:
        (out / name).mkdir()
    query = (
        f"CREATE TEMP TABLE deduped AS WITH published AS ({published}), "
        f"{load_statement('normalise')}, "
        f"passing AS (SELECT * FROM normalised WHERE {reason} IS NULL), deduped AS ({deduped}) "
        "SELECT *, md5('0:' || address) AS rank FROM deduped"
    )
    spill = out / "_tmp" / "spill"
    with open_database(spill, memory, threads) as connection:
        execute_query(connection, query, rule_parameters(config.filters))
        for source, name in enumerate(files):
            connection.execute(
                "COPY (SELECT md5(address || chr(10) || caption) AS uid, $name AS source, url, "
                "caption, original_id, similarity, width AS width_hint, height AS height_hint, "
                "CASE WHEN everyone = 1 << source THEN '' ELSE array_to_string(list_filter("
                "$names::VARCHAR[], lambda name, place: place <> $source + 1 AND "
                "(everyone >> (place - 1)) & 1 = 1), ',') END AS also_in "
                "FROM deduped WHERE source = $source ORDER BY rank) "
                "TO $target (FORMAT parquet, CODEC zstd, COMPRESSION_LEVEL 1)",
                {
                    "name": name,
                    "names": list(files),
                    "source": source,
                    "target": str(out / name / "all.parquet"),
                },
            )


def with_polars(files: Files, out: Path, memory: str, threads: int) -> None:
    """Lazy reading, the streaming engine, one sort that makes `unique` deterministic.

    Polars has no md5 and no URL rewriting: those go through Python, the latter for messy rows only.
    """
    import polars

    def frame(source: int, path: Path) -> Any:
        rows = polars.scan_parquet(path, glob=False, row_index_name="row_in_file")
        laion = source == 0
        url, text, identity = ("URL", "TEXT", "SAMPLE_ID") if laion else ("url", "text", "id")
        sides = ("WIDTH", "HEIGHT") if laion else ("width", "height")
        passes = (
            polars.col("NSFW").str.to_uppercase().is_in(["UNLIKELY", "UNSURE"])
            if laion
            else (
                (polars.max_horizontal("nsfw_score_opennsfw2", "nsfw_score_gantman") <= 0.5)
                & (polars.col("watermark_score") <= 0.8)
            )
        )
        similarity = "similarity" if laion else "clip_similarity_vitb32"
        return rows.filter(passes).select(
            polars.lit(source).alias("source"),
            "row_in_file",
            polars.col(url).alias("url"),
            polars.col(text).alias("caption"),
            polars.col(identity).cast(polars.String).alias("original_id"),
            polars.col(similarity).alias("similarity"),
            polars.col(sides[0]).cast(polars.Int64).alias("width_hint"),
            polars.col(sides[1]).cast(polars.Int64).alias("height_hint"),
        )

    frames = [
        frame(source, path).with_columns(polars.lit(number).alias("file"))
        for source, name in enumerate(files)
        for number, path in enumerate(files[name])
    ]
    by_python = {"return_dtype": polars.String, "skip_nulls": True}
    url, caption = polars.col("url"), polars.col("caption")
    normal = url.str.contains(NORMAL_URL)
    rows = (
        polars.concat(frames)
        .with_columns(
            polars.when(normal)
            .then(url)
            .otherwise(polars.when(~normal).then(url).map_elements(_fetched, **by_python))
            .alias("url"),
            polars.when(~caption.str.contains(MESSY_CAPTION))
            .then(caption)
            .otherwise(
                polars.when(caption.str.contains(MESSY_CAPTION))
                .then(caption)
                .map_elements(tidy, **by_python)
            )
            .alias("caption"),
        )
        .filter(caption.str.len_chars().is_between(3, 1000) & url.is_not_null())
        .with_columns(url.str.replace("^https?://", "").alias("address"))
        .sort("source", -polars.col("similarity"), "original_id", "file", "row_in_file")
        .unique("address", keep="first", maintain_order=True)
        .with_columns(
            polars.col("address").map_elements(_rank, return_dtype=polars.String).alias("rank"),
            polars.concat_str("address", polars.lit("\n"), "caption")
            .map_elements(_md5, return_dtype=polars.String)
            .alias("uid"),
        )
        .sort("source", "rank")
        .collect(engine="streaming")
    )
    for source, name in enumerate(files):
        (out / name).mkdir()
        rows.filter(polars.col("source") == source).with_columns(
            polars.lit(name).alias("source")
        ).select(*OUTPUT, "height_hint").write_parquet(
            out / name / "all.parquet", compression="zstd", compression_level=1
        )


def with_pandas(files: Files, out: Path, memory: str, threads: int) -> None:
    """Everything in memory."""
    import pandas

    frames = []
    for source, name in enumerate(files):
        for number, path in enumerate(files[name]):
            laion = source == 0
            scores = ["nsfw_score_opennsfw2", "nsfw_score_gantman"]
            wanted = (
                ["URL", "TEXT", "SAMPLE_ID", "similarity", "WIDTH", "HEIGHT", "NSFW"]
                if laion
                else ["url", "text", "id", "clip_similarity_vitb32", "width", "height", *scores]
            )
            wanted += [] if laion else ["watermark_score"]
            rows = pandas.read_parquet(path, columns=wanted, dtype_backend="pyarrow")
            passes = (
                rows["NSFW"].str.upper().isin(["UNLIKELY", "UNSURE"])
                if laion
                else (rows[scores].max(axis=1) <= 0.5) & (rows["watermark_score"] <= 0.8)
            )
            rows = rows[wanted[:6]][passes]
            rows.columns = [
                *("url", "caption", "original_id", "similarity", "width_hint", "height_hint")
            ]
            frames.append(rows.assign(source=source, file=number, row_in_file=rows.index))
    rows = pandas.concat(frames, ignore_index=True)
    messy = ~rows["url"].str.contains(NORMAL_URL, regex=True)
    rows.loc[messy, "url"] = rows.loc[messy, "url"].map(_fetched)
    messy = rows["caption"].str.contains(MESSY_CAPTION, regex=True)
    rows.loc[messy, "caption"] = rows.loc[messy, "caption"].map(tidy)
    rows = rows[rows["url"].notna() & rows["caption"].str.len().between(3, 1000)]
    rows["original_id"] = rows["original_id"].astype("string[pyarrow]")
    rows["address"] = rows["url"].str.replace("^https?://", "", regex=True)
    rows = rows.sort_values(
        ["source", "similarity", "original_id", "file", "row_in_file"],
        ascending=[True, False, True, True, True],
    ).drop_duplicates("address")
    rows["rank"] = rows["address"].map(_rank)
    rows["uid"] = (rows["address"] + "\n" + rows["caption"]).map(_md5)
    rows = rows.sort_values(["source", "rank"])
    for source, name in enumerate(files):
        (out / name).mkdir()
        rows[rows["source"] == source].assign(source=name)[[*OUTPUT, "height_hint"]].to_parquet(
            out / name / "all.parquet", compression="zstd", compression_level=1, index=False
        )


def _fetched(url: str) -> str | None:
    found = address_and_url(url)
    return found[1] if found else None


def _md5(text: str) -> str:
    return hashlib.md5(text.encode()).hexdigest()


def _rank(address: str) -> str:
    return _md5(f"0:{address}")


WAYS: dict[str, tuple[Callable[[Files, Path, str, int], None], str]] = {
    "ours": (with_ours, "duckdb"),
    "DuckDB GROUP BY": (with_group_by, "duckdb"),
    "DuckDB window": (with_window, "duckdb"),
    "polars": (with_polars, "polars"),
    "pandas": (with_pandas, "pandas"),
}
"""Name -> (what to call, the package it needs)."""
WITHOUT_A_LIMIT = ("polars", "pandas")
SPAWN = multiprocessing.get_context("spawn")


def measure_here(way: str, files: Files, memory: str, threads: int, out: Path) -> dict[str, Any]:
    """One run in this process."""
    out.mkdir()
    largest, stop = [0, 0], threading.Event()
    watch = threading.Thread(target=_watch_temporary, args=(out / "_tmp", largest, stop))
    watch.start()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        WAYS[way][0](files, out, memory, threads)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    finally:
        stop.set()
        watch.join()
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    written = [str(path) for name in files for path in sorted((out / name).glob("*.parquet"))]
    digest, rows = hashlib.md5(), 0
    for path in written:
        with duckdb.connect() as connection:
            reading = connection.execute(
                "SELECT uid, url, original_id, similarity, width_hint FROM read_parquet(?)", [path]
            )
            while block := reading.fetchmany(50_000):
                digest.update("".join(map(repr, block)).encode())
                rows += len(block)
    return {
        "cpu_s": cpu,
        "wall_s": wall,
        "peak_gb": peak_gb,
        "spill_gb": largest[0] / 1e9,
        "temp_gb": largest[1] / 1e9,
        "rows": rows,
        "digest": digest.hexdigest()[:12],
    }


def _watch_temporary(folder: Path, largest: list[int], stop: threading.Event) -> None:
    """Keep the largest sizes of the folder's `spill`, and of the folder."""
    while not stop.wait(0.5):
        for place, part in enumerate((folder / "spill", folder)):
            paths = [Path(at, name) for at, _, names in os.walk(part) for name in names]
            largest[place] = max(largest[place], sum(map(_size, paths)))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # it was removed meanwhile


def measure(
    way: str, folder: Path, rows: int, arguments: argparse.Namespace, memory: str
) -> dict[str, Any]:
    """One run in a process of its own."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, __file__, "--one", way, "--folder", str(folder)]
    command += ["--rows", str(rows), "--memory", memory, "--files", str(arguments.files)]
    command += ["--threads", str(arguments.threads)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=arguments.timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {arguments.timeout_s} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["killed"])[-1]
        return {"failed": last[:80] if done.returncode > 0 else f"signal {-done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def rounds(
    arguments: argparse.Namespace, here: Sequence[str], known: set[tuple[Any, ...]]
) -> Iterator[dict[str, Any]]:
    """The figures of every run not `known`; sizes take turns inside, ways inside sizes."""
    for repeat in range(arguments.repeats):
        for rows in arguments.rows:
            wanted = [
                {"repeat": repeat, "rows": rows, "way": way, "memory": memory}
                for way in here
                for memory in arguments.memory[: 1 if way in WITHOUT_A_LIMIT else None]
                if (repeat, rows, way, memory) not in known
            ]
            if not wanted:
                continue
            with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
                # Elsewhere: Linux counts the memory of who starts a process in the process's peak.
                writer = SPAWN.Process(
                    target=write_metadata, args=(Path(name), rows, arguments.files)
                )
                writer.start()
                writer.join()
                for run_ in wanted:
                    found = measure(run_["way"], Path(name), rows, arguments, run_["memory"])
                    yield {
                        **run_,
                        **{"written" if key == "rows" else key: found[key] for key in found},
                    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rows", type=int, nargs="+", default=[5_000_000, 10_000_000, 20_000_000])
    options.add_argument("--files", type=int, default=4, help="files a source")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--memory", nargs="+", default=["4GB", "1GB"], help="database's limits")
    options.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    options.add_argument("--repeats", type=int, default=1)
    options.add_argument("--timeout-s", type=float, default=1_800)
    options.add_argument("--scratch", type=Path, help="folder for data and spill")
    options.add_argument("--results", type=Path, help="file of JSON lines: what it has is not run")
    options.add_argument("--one", choices=list(WAYS), help=argparse.SUPPRESS)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.one:
        files = write_metadata(arguments.folder, arguments.rows[0], arguments.files)
        print(
            json.dumps(
                measure_here(
                    *(arguments.one, files, arguments.memory[0], arguments.threads),
                    arguments.folder / "out",
                )
            )
        )
        return
    missing = {way: need for way, (_, need) in WAYS.items() if not importlib.util.find_spec(need)}
    for way in missing:
        print(f"{way} is left out: not installed (extra `bench`)\n")
    here = [way for way in arguments.ways if way not in missing]
    saved = arguments.results
    found = []
    if saved and saved.is_file():
        found = [json.loads(line) for line in saved.read_text().splitlines()]
    known = {tuple(run_[name] for name in ("repeat", "rows", "way", "memory")) for run_ in found}
    for run_ in rounds(arguments, here, known):
        found.append(run_)
        if saved:
            with saved.open("a") as file:
                file.write(json.dumps(run_) + "\n")
    best: dict[tuple[int, str, str], dict[str, Any]] = {}
    for run_ in sorted(found, key=lambda run_: run_["rows"]):
        key = run_["rows"], run_["way"], run_["memory"]
        if key not in best or run_.get("cpu_s", 1e9) < best[key].get("cpu_s", 1e9):
            best[key] = run_
    print_table(best)


def print_table(best: Mapping[tuple[int, str, str], Mapping[str, Any]]) -> None:
    """The figures as Markdown, and what they mean for a web-scale collection."""
    print(
        "| rows | way | limit | rows per CPU-s | CPU-s | wall s | peak GB | spill GB "
        "| temp GB | digest |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for (rows, way, memory), found in best.items():
        limit = "-" if way in WITHOUT_A_LIMIT else memory
        if "failed" in found:
            print(f"| {rows:,} | {way} | {limit} | failed: {found['failed']} ||||||| ")
            continue
        print(
            f"| {rows:,} | {way} | {limit} | {rows / found['cpu_s']:,.0f} | {found['cpu_s']:.1f} "
            f"| {found['wall_s']:.1f} | {found['peak_gb']:.2f} | {found['spill_gb']:.2f} "
            f"| {found['temp_gb']:.2f} | {found['digest']} |"
        )
    ours = {key: found for key, found in best.items() if key[1] == "ours" and "cpu_s" in found}
    if ours:
        (rows, _, memory), found = max(ours.items(), key=lambda item: (item[0][0], item[0][2]))
        hours = found["cpu_s"] / rows * WEB_SCALE / 3600
        print(
            f"\nAt {WEB_SCALE:,} rows: {hours:.1f} CPU-hours, if a row goes on costing what it "
            f"does at {rows:,} ({memory}): every phase works on one file or one partition at "
            "a time. A partition holds 250,000 rows up to half a billion; then there are 2,048, of "
            f"{WEB_SCALE / 2_048 / 1e6:.1f} million rows each here."
        )


if __name__ == "__main__":
    main()
