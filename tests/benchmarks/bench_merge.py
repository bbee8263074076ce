"""How fast, and in how much memory, a merge runs on synthetic metadata.

    python tests/benchmarks/bench_merge.py [--rows 1_000_000] [--threads 2] [--memory 2GB]

Covers: LAION-like (76 %) and COYO-like (24 %) rows with the published faults: duplicates within and
across the sources, http beside https, upper-case hosts, fragments, letters that need escapes.
Not here: correctness; see tests/tasks/merge.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import duckdb

from tasks.merge.config import MergeConfig
from tasks.merge.merge import merge_sources

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
    "SELECT id, url, text, width, height, '0' AS image_phash, similarity AS clip_similarity_vitb32,"
    " score / 2 AS nsfw_score_opennsfw2, score / 2 AS nsfw_score_gantman, score AS watermark_score"
)


def write_metadata(folder: Path, rows: int, files: int) -> dict[str, list[Path]]:
    """Synthetic metadata; `files` parquet files a source."""
    found: dict[str, list[Path]] = {}
    for salt, (name, columns, share) in enumerate((("laion", LAION, 76), ("coyo", COYO, 24))):
        found[name] = [folder / f"{name}-{part}.parquet" for part in range(files)]
        for part, path in enumerate(found[name]):
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


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rows", type=int, default=1_000_000)
    options.add_argument("--files", type=int, default=4, help="files a source")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--memory", default="2GB", help="memory limit of the database")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        files = write_metadata(Path(name), arguments.rows, arguments.files)
        before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        sources = [{"name": source, "files": "-"} for source in files]
        config = MergeConfig.from_mapping(
            {"sources": sources, "memory_limit": arguments.memory}, where="benchmark"
        )
        out = Path(name, "out")
        out.mkdir()
        wall, cpu = time.perf_counter(), time.process_time()
        phases: dict[str, float] = {}
        last = ("", cpu)

        def report(done: float, total: float, detail: str = "") -> None:
            nonlocal last
            phase, now = detail.partition(":")[0], time.process_time()
            phases[last[0]] = phases.get(last[0], 0.0) + now - last[1]
            last = (phase, now)

        made = merge_sources(config, files, out, report, threads=arguments.threads)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{made.counts['rows_read']:,} rows read, {made.counts['selected']:,} selected")
    print(f"{cpu:.1f} CPU-s, {wall:.1f} s wall, {made.counts['rows_read'] / cpu:,.0f} rows/CPU-s")
    print("CPU-s by phase: " + ", ".join(f"{k or 'inspect'} {v:.1f}" for k, v in phases.items()))
    print(f"peak RSS {peak_mb:,.0f} MB ({before_mb:,.0f} MB after writing the metadata)")


if __name__ == "__main__":
    main()
