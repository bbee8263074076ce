from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.__main__ import main
from flows.config.recipe import load_recipe
from flows.planning.recipe_cost import estimate_data, is_large


def test_sources_inspect_prints_columns_rows_and_gaps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"url": ["http://a", None], "caption": ["a cat", "b"], "similarity": [0.05, 0.95]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    assert main(["sources", "inspect", str(tmp_path / "*.parquet")]) == 0
    shown = capsys.readouterr().out
    assert "1 files, 2 rows" in shown
    [url] = [line.split() for line in shown.splitlines() if line.startswith("url")]
    assert url == ["url", "VARCHAR", "url", "50.0%"]
    [score] = [line.split() for line in shown.splitlines() if line.startswith("similarity")]
    assert score == ["similarity", "DOUBLE", "similarity", "0.0%"]


def test_sources_inspect_counts_the_lines_that_a_merge_would_leave_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        b"url,caption",
        b"http://a.example/1.jpg,a cat",
        b"http://a.example/2.jpg,caf\xe9",
        b"x",
    ]
    (tmp_path / "a.csv").write_bytes(b"\n".join(lines))
    assert main(["sources", "inspect", str(tmp_path / "a.csv")]) == 0
    shown = capsys.readouterr().out
    assert "1 would be left out: not_utf8" in shown
    assert f"the first is {tmp_path}/a.csv, line 3: not_utf8" in shown


def test_a_withdrawn_collection_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sources", "inspect", "hf://datasets/laion/laion2B-en/*.parquet"]) == 2
    assert "withdrawn in December 2023" in capsys.readouterr().err


def test_the_estimate_of_merged_2b_adds_up() -> None:
    caps = {"laion2b": 1_600_000_000, "coyo700m": 400_000_000}
    overrides = [f"merge.sources.{name}.target_count={cap}" for name, cap in caps.items()]
    overrides += [f"merge.sources.{name}.expected_success=0.5" for name in caps]
    overrides += ["merge.rows_per_file=10000", "download.samples_per_shard=10000"]
    recipe = load_recipe("demo", [*overrides, "download.image_px=256"])
    assert is_large(recipe) and not is_large(load_recipe("demo"))
    figures = {line.what: line.figure for line in estimate_data(recipe)}
    assert figures["samples, at most"] == "2,000,000,000"
    assert figures["rows selected"] == "4,000,000,000"
    assert figures["shards"] == "400,000"
    assert figures["images"] == "60.6 TB"
    assert all(line.origin for line in estimate_data(recipe))
