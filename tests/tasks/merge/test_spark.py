from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.merge.config import MergeConfig
from tasks.merge.merge import merge_sources
from tests.tasks.merge import metadata
from tests.tasks.merge.metadata import coyo, find_files, laion, output_rows, write

MISSING = [
    name
    for name, found in (
        ("pyspark", importlib.util.find_spec("pyspark")),
        ("Java", shutil.which("java")),
    )
    if not found
]


@pytest.fixture(autouse=True)
def local_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads of this machine, nothing but loopback, no web page."""
    settings = {
        "spark.master": "local[2]",
        "spark.ui.enabled": "false",
        "spark.sql.shuffle.partitions": "4",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.memory": "512m",
        "spark.local.dir": str(tmp_path / "spark"),
    }
    folder = tmp_path / "conf"
    folder.mkdir()
    text = "".join(f"{name} {value}\n" for name, value in settings.items())
    (folder / "spark-defaults.conf").write_text(text)
    monkeypatch.setenv("SPARK_CONF_DIR", str(folder))
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    yield


def recipe(folder: Path, **changes: object) -> MergeConfig:
    """Two sources with duplicates of every kind, one of them compared with a cleaned edition."""
    draw = random.Random(3)
    rows = [laion(n, TEXT=f"text {n}", similarity=draw.choice([0.28, 0.3])) for n in range(900)]
    for part in range(2):
        picked = draw.sample(rows, 600)
        write(folder / f"laion/{part}.parquet", metadata.LAION_2B, picked)
    known = [{"url": row["URL"], "caption": "-"} for row in rows if row["SAMPLE_ID"] % 9]
    write(folder / "cleaned/0.parquet", metadata.RELAION, known)
    others = [coyo(n) for n in range(500)]
    others += [coyo(900 + n, url=laion(n)["URL"].replace("http:", "https:")) for n in range(300)]
    write(folder / "coyo/0.parquet", metadata.COYO_700M, others)
    sources = [
        {
            "name": "laion",
            "files": str(folder / "laion/*.parquet"),
            "diff_against": str(folder / "cleaned/*.parquet"),
            "target_count": 500,
        },
        {"name": "coyo", "files": str(folder / "coyo/*.parquet"), "skip_count": 20},
    ]
    return MergeConfig.from_mapping(
        {"sources": sources, "rows_per_file": 64, "partitions": 3, **changes}, where="test"
    )


@pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not installed")
@pytest.mark.slow
@pytest.mark.parametrize("balance", [None, {"t": 90, "entries": 40}])
def test_spark_gives_the_same_rows_in_the_same_files_as_duckdb(
    tmp_path: Path, balance: dict[str, int] | None
) -> None:
    found = {}
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    few = recipe(tmp_path).sources[1].model_copy(update={"target_count": 9})
    first = MergeConfig(sources=(few,))
    merge_sources(first, find_files(first), earlier, threads=1)
    for engine in ("duckdb", "spark"):
        config = recipe(tmp_path, engine=engine, balance=balance)
        out = tmp_path / engine
        out.mkdir()
        made = merge_sources(config, find_files(config), out, threads=1, given=[earlier])
        found[engine] = (
            [str(path.relative_to(out)) for path in made.files],
            output_rows(made.files),
            json.loads((out / "report.json").read_text()),
            dict(made.counts),
        )
    assert found["spark"] == found["duckdb"]
    counts = found["spark"][3]
    lost = "too_frequent" if balance else "not_selected"
    for reason in ("withdrawn", lost, "duplicate_in_source"):
        assert counts[f"laion.dropped.{reason}"] > 0
    assert counts["coyo.dropped.duplicate_across_sources"] > 0
    assert counts["coyo.dropped.given_before"] == 20 + 9


def test_without_java_or_pyspark_the_need_is_one_sentence(tmp_path: Path) -> None:
    # a process of its own: a Java that is running already would be used
    program = "from tasks.merge.merge import spark_runner\nwith spark_runner(): pass"
    environment = {**os.environ, "PATH": str(tmp_path), "JAVA_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[3],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.strip().splitlines()[-1].startswith("evaclip_model.errors.InputError: ")
    assert "Java 17" in done.stderr.strip().splitlines()[-1]
