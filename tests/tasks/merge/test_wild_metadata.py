"""Metadata as people have it: a bad line costs itself, and what cannot be judged is unknown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaclip_model.errors import InputError
from tasks.merge.config import MergeConfig
from tasks.merge.merge import merge_sources

Row = dict[str, Any]


def merged(
    folder: Path, files: str, filters: Row | None = None, config: Row | None = None, **source: Any
) -> tuple[list[Row], Row]:
    """(selected rows by URL, the source's part of the report)."""
    whole = {
        "sources": [{"name": "mine", "files": str(folder / files), **source}],
        **(config or {}),
    }
    if filters is not None:
        whole["filters"] = filters
    out = folder / "out"
    out.mkdir(exist_ok=True)
    paths = sorted(folder.glob(files))
    made = merge_sources(
        MergeConfig.from_mapping(whole, where="t"), {"mine": paths}, out, threads=1
    )
    rows = [
        row
        for path in made.files
        if path.suffix == ".parquet"
        for row in pq.read_table(path).to_pylist()
    ]
    [report] = json.loads((out / "report.json").read_text())["sources"]
    assert report["rows_read"] == report["selected"] + sum(report["dropped"].values())
    return sorted(rows, key=lambda row: str(row["url"])), report


def url(number: int) -> str:
    return f"http://a.example/{number}.jpg"


def test_numbers_and_dates_are_captions_like_others(tmp_path: Path) -> None:
    lines = [f"{url(0)}\t1984\tx", f"{url(1)}\t2021-03-01\ty", f"{url(2)}\t3.50\tz"]
    (tmp_path / "a.tsv").write_text("url\tcaption\tpage\n" + "\n".join(lines) + "\n")
    rows, _ = merged(tmp_path, "a.tsv")
    assert [row["caption"] for row in rows] == ["1984", "2021-03-01", "3.50"]


def test_a_bad_line_is_counted_and_named_in_the_users_own_file(tmp_path: Path) -> None:
    good = [json.dumps({"url": url(n), "caption": f"a cat {n}"}) for n in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join([*good[:2], "{", *good[2:]]))
    rows, report = merged(tmp_path, "a.jsonl")
    assert len(rows) == 5
    assert report["dropped"]["unreadable_line"] == 1
    assert report["unreadable_lines"] == [f"{tmp_path}/a.jsonl, line 3: not_json"]


def test_a_key_that_only_late_rows_of_json_lines_have_is_a_column(tmp_path: Path) -> None:
    lines = [{"url": url(n), "caption": f"a cat {n}"} for n in range(10_050)]
    lines[-1]["punsafe"] = "0.9"
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    _, report = merged(tmp_path, "a.jsonl", {"unknown_unsafe": "keep"})
    assert (report["dropped"]["unsafe"], report["selected"]) == (1, 10_049)


def test_a_file_of_bad_lines_is_refused_with_the_first_of_them(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("url,caption\nx\ny\n")
    with pytest.raises(InputError, match=r"a\.csv, line 2: wrong_number_of_columns"):
        merged(tmp_path, "a.csv")


def test_a_list_without_a_header_has_numbered_columns(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text(f"a cat\t{url(0)}\na dog\t{url(1)}\n")
    columns = {"url": "column1", "caption": "column0"}
    rows, _ = merged(tmp_path, "a.tsv", header=False, columns=columns)
    assert [row["caption"] for row in rows] == ["a cat", "a dog"]
    with pytest.raises(InputError, match=r"tsv: source 'mine' has no column 'URL'"):
        merged(tmp_path, "a.tsv", header=False)


def test_scores_of_a_text_file_are_judged_and_what_is_no_number_is_unknown(tmp_path: Path) -> None:
    scores = ["0.1", "0.9", "0.2", "n/a", ""]
    lines = [f"{url(n)},a cat {n},{score}" for n, score in enumerate(scores)]
    (tmp_path / "a.csv").write_text("url,caption,punsafe\n" + "\n".join(lines) + "\n")
    _, report = merged(tmp_path, "a.csv")
    assert (report["dropped"]["unsafe"], report["dropped"]["unknown_unsafe"]) == (1, 2)


def text_column(values: list[bytes]) -> pa.Array:
    return pa.StringArray.from_buffers(len(values), *pa.array(values, pa.binary()).buffers()[1:3])


def test_text_that_is_not_utf8_costs_its_row_and_only_where_it_counts(tmp_path: Path) -> None:
    urls = [url(n).encode() for n in range(6)]
    captions = [b"a nice cat %d" % n for n in range(6)]
    pages = [b"page"] * 6
    captions[1], urls[2], pages[3] = b"caf\xe9", b"http://a.example/caf\xe9.jpg", b"\xff"
    named = {"url": urls, "caption": captions, "page": pages}
    table = pa.table({name: text_column(values) for name, values in named.items()})
    pq.write_table(table, tmp_path / "a.parquet")
    rows, report = merged(tmp_path, "a.parquet")
    assert [row["url"] for row in rows] == [url(n) for n in (0, 3, 4, 5)]
    assert report["dropped"]["not_utf8"] == 2


@pytest.mark.parametrize(
    ("column", "filters", "reason"),
    [
        ({"punsafe": [0.1, 0.1]}, {}, "unknown_unsafe"),
        ({"NSFW": ["UNLIKELY"] * 2}, {}, "unknown_unsafe"),
        ({"pwatermark": [0.1] * 2}, {"unknown_watermark": "drop"}, "unknown_watermark"),
        ({"similarity": [0.4] * 2}, {"min_similarity": 0.3}, "unknown_similarity"),
        (
            {"language": ["en"] * 2},
            {"languages": ["en"], "unknown_language": "drop"},
            "unknown_language",
        ),
    ],
)
def test_rows_of_a_file_that_lacks_a_column_of_its_source_are_unknown(
    tmp_path: Path, column: Row, filters: Row, reason: str
) -> None:
    for name, numbers, more in (("0", (0, 1), column), ("1", (2, 3, 4), {})):
        rows = {"url": [url(n) for n in numbers], "caption": [f"a cat {n}" for n in numbers]}
        pq.write_table(pa.table({**rows, **more}), tmp_path / f"{name}.parquet")
    kept, report = merged(tmp_path, "*.parquet", filters)
    assert [row["url"] for row in kept] == [url(0), url(1)]
    assert report["dropped"][reason] == 3
    kept, report = merged(tmp_path, "*.parquet", {**filters, reason: "keep"})
    assert (len(kept), report["dropped"][reason]) == (5, 0)


@pytest.mark.parametrize("kind", [pa.int32(), pa.int64(), pa.float64(), pa.string(), pa.uint64()])
def test_keys_of_a_sidecar_match_by_value_whatever_their_type(
    tmp_path: Path, kind: pa.DataType
) -> None:
    rows = {"url": [url(n) for n in range(4)], "caption": ["a nice cat"] * 4}
    pq.write_table(pa.table({**rows, "id": pa.array(range(4), pa.int64())}), tmp_path / "a.parquet")
    keys = pa.array(["0.0", "1", "2.00"]) if kind == pa.string() else pa.array([0, 1, 2]).cast(kind)
    scores = pa.table({"id": keys, "punsafe": [0.1, 0.9, 0.1]})
    (tmp_path / "scores").mkdir()
    pq.write_table(scores, tmp_path / "scores/s.parquet")
    sidecar = {"files": str(tmp_path / "scores/*.parquet"), "on": "id", "key": "id"}
    kept, report = merged(tmp_path, "a.parquet", sidecars=[{**sidecar, "columns": ["punsafe"]}])
    assert [row["url"] for row in kept] == [url(0), url(2)]
    assert (report["dropped"]["unsafe"], report["dropped"]["unknown_unsafe"]) == (1, 1)
    assert [(one["rows"], one["matched"]) for one in report["sidecars"]] == [(4, 3)]


def test_the_hash_column_of_a_source_is_carried_where_a_download_wants_it(tmp_path: Path) -> None:
    rows = {"url": [url(0)], "caption": ["a nice cat"], "md5": ["0" * 32], "sha1": ["1" * 40]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    for wanted, found in (("md5", "0" * 32), ("image_hash", "0" * 32), ("sha1", "1" * 40)):
        [row], _ = merged(tmp_path, "a.parquet", config={"hash_column": wanted})
        assert row["image_hash"] == found
    [row], _ = merged(tmp_path, "a.parquet")
    assert "image_hash" not in row
    with pytest.raises(InputError, match=r"hash_column names 'sha512', but no source .* md5, sha1"):
        merged(tmp_path, "a.parquet", config={"hash_column": "sha512"})
