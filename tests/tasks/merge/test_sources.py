from __future__ import annotations

import csv
import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaclip_model.errors import InputError
from tasks.merge.config import MergeConfig
from tasks.merge.database import laion_hashes
from tasks.merge.filters import BLOCKED_TABLES, read_lists
from tasks.merge.merge import merge_sources
from tasks.merge.merge_plan import inspect_files
from tasks.merge.metadata_files import find_metadata, outside_files, remote_fingerprint
from tests.tasks.merge import metadata
from tests.tasks.merge.metadata import coyo, laion, output_rows, write


def merged(tmp_path: Path, source: dict[str, Any], **changes: object) -> tuple[Any, Any]:
    """(rows, report of the one source) of a merge of `source`."""
    config = MergeConfig.from_mapping(
        {"sources": [{"name": "mine", **source}], **changes}, where="test"
    )
    out = tmp_path / "out"
    out.mkdir(parents=True)
    files = {"mine": find_metadata(config.sources[0].files, "test")}
    made = merge_sources(config, files, out, threads=1)
    [report] = json.loads((out / "report.json").read_text())["sources"]
    return output_rows(made.files), report


ROWS = [
    {"url": f"http://a.example/{n}", "caption": f'a "cat", {n}\nü', "similarity": n / 200}
    for n in range(120)
]


def write_csv(path: Path, delimiter: str = ",") -> None:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("rows.csv", {}),
        ("rows.csv.gz", {}),
        ("rows.tsv", {}),
        ("rows.jsonl", {}),
        ("rows.txt", {"format": "jsonl"}),
    ],
)
def test_text_files_give_the_rows_that_parquet_gives(
    tmp_path: Path, name: str, changes: dict[str, str]
) -> None:
    write(tmp_path / "parquet" / "rows.parquet", metadata.RELAION, ROWS)
    expected, _ = merged(tmp_path / "parquet", {"files": str(tmp_path / "parquet/*.parquet")})
    path = tmp_path / name
    if "csv" in name or "tsv" in name:
        write_csv(path, "\t" if "tsv" in name else ",")
    else:
        write_jsonl(path)
    rows, _ = merged(tmp_path, {"files": str(path), **changes})
    assert rows == expected and len(rows) == 120


def test_a_suffix_that_says_nothing_is_asked_about(tmp_path: Path) -> None:
    (tmp_path / "rows.dat").write_text("x")
    with pytest.raises(InputError, match=r"rows.dat: source 'mine' reads .*set its 'format'"):
        merged(tmp_path, {"files": str(tmp_path / "rows.dat")})


@pytest.fixture
def bucket() -> Iterator[str]:
    """An object store of its own: fsspec's, in memory."""
    filesystem = fsspec.filesystem("memory")
    yield "memory://metadata"
    filesystem.rm("/metadata", recursive=True)


def test_files_behind_urls_are_read_through_fsspec(tmp_path: Path, bucket: str) -> None:
    local = write(tmp_path / "0.parquet", metadata.RELAION, ROWS)
    fsspec.filesystem("memory").put(str(local), f"{bucket}/part-0.parquet")
    rows, _ = merged(tmp_path, {"files": f"{bucket}/*.parquet"})
    (tmp_path / "local").mkdir()
    assert rows == merged(tmp_path / "local", {"files": str(local)})[0]
    before = remote_fingerprint(find_metadata(f"{bucket}/*", "test"))
    fsspec.filesystem("memory").pipe(f"{bucket}/part-1.parquet", local.read_bytes())
    assert remote_fingerprint(find_metadata(f"{bucket}/*", "test")) != before


def test_a_protocol_without_its_package_is_one_sentence() -> None:
    for url in ("nothing://a/b", "ftp://a/b"):
        with pytest.raises(InputError, match=f"{url} cannot be read"):
            find_metadata(url, "test")


class _Away(Exception):
    """An error of a store's own kind, as botocore has."""


class Away(fsspec.AbstractFileSystem):
    """An object store that does not answer."""

    protocol = "away"

    def glob(self, path: str, *_: object, **__: object) -> list[str]:
        raise _Away(f"no endpoint for {path}")

    def cat_file(self, path: str, *_: object, **__: object) -> bytes:
        raise _Away(f"no endpoint for {path}")


def test_an_object_store_that_does_not_answer_is_one_sentence(tmp_path: Path) -> None:
    fsspec.register_implementation("away", Away, clobber=True)
    with pytest.raises(InputError, match=r"away://a/\* cannot be listed \(no endpoint"):
        find_metadata("away://a/*", "test")
    path = write(tmp_path / "a.parquet", metadata.COYO_700M, [coyo(1)])
    lists = {"blocklists": {"urls": ["away://a/list.txt"]}}
    with pytest.raises(InputError, match=r"blocklist away://a/list.txt cannot be read \(no endp"):
        merged(tmp_path, {"files": str(path)}, filters=lists)


@pytest.mark.parametrize(
    "files",
    [
        "hf://datasets/laion/laion2B-en/*.parquet",
        "hf://datasets/laion/laion400m/*.parquet",
        "https://huggingface.co/datasets/laion/laion1B-nolang/resolve/main/0.parquet",
        "s3://bucket/laion/laion5B/part-0.parquet",
    ],
)
def test_withdrawn_collections_are_refused_by_name_with_the_reason(files: str) -> None:
    with pytest.raises(InputError) as refused:
        MergeConfig.from_mapping({"sources": [{"name": "a", "files": files}]}, where="r.toml")
    assert "withdrawn in December 2023" in str(refused.value)
    assert "relaion2B-en-research-safe" in str(refused.value)


def test_the_cleaned_edition_is_not_refused() -> None:
    files = "hf://datasets/laion/relaion2B-en-research-safe/*.parquet"
    MergeConfig.from_mapping({"sources": [{"name": "a", "files": files}]}, where="r.toml")


def test_an_old_copy_alone_is_refused_and_compared_keeps_what_the_cleaned_edition_has(
    tmp_path: Path,
) -> None:
    old = write(tmp_path / "old.parquet", metadata.LAION_2B, [laion(n) for n in range(50)])
    with pytest.raises(InputError, match="set diff_against to its files"):
        merged(tmp_path, {"files": str(old)})
    known = [
        {"url": laion(n)["URL"].replace("http:", "HTTPS:"), "caption": "other"} for n in range(30)
    ]
    write(tmp_path / "new/0.parquet", metadata.RELAION, known[:20])
    write(tmp_path / "new/1.parquet", metadata.RELAION, known[20:])
    (tmp_path / "again").mkdir()
    rows, report = merged(
        tmp_path / "again",
        {"files": str(old), "diff_against": str(tmp_path / "new/*.parquet")},
        partitions=3,
    )
    assert {int(row["original_id"]) for row in rows} == set(range(30))
    assert report["dropped"]["withdrawn"] == 20


def test_laion_hash_keeps_its_values() -> None:
    expected = {
        "foo": -2129773440516405919,
        "": 0,
        "http://a.example/1.jpga picture of a cat": -4056582365720639693,
        "é" * 15 + "x": 4307244915617939933,
        "0123456789abcdef": 5467490433528156583,
        "0123456789abcde": -6472281833689111727,
    }
    assert laion_hashes(pa.chunked_array([list(expected)])).to_pylist() == [*expected.values()]


def sidecar(path: Path, rows: list[tuple[object, float | None]], key: pa.DataType) -> str:
    keys, scores = zip(*rows, strict=True)
    table = pa.table({"hash": pa.array(keys, key), "punsafe": pa.array(scores, pa.float32())})
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path)
    return str(path)


@pytest.mark.parametrize("policy", ["drop", "keep"])
def test_a_sidecar_is_joined_by_laions_hash_and_gaps_follow_the_policy(
    tmp_path: Path, policy: str
) -> None:
    rows = [laion(n) for n in range(60)]
    path = write(tmp_path / "a.parquet", metadata.LAION_2B, rows)
    texts = pa.chunked_array([[row["URL"] + row["TEXT"] for row in rows]])
    hashes = laion_hashes(texts).to_pylist()
    scores = [(int(key), 0.9 if n % 5 == 0 else 0.1) for n, key in enumerate(hashes[:40])]
    # of two rows with one key the worse counts
    sidecar(tmp_path / "side/0.parquet", [*scores[:20], (int(hashes[1]), 0.8)], pa.int64())
    sidecar(tmp_path / "side/1.parquet", scores[20:], pa.int64())
    found, report = merged(
        tmp_path,
        {
            "files": str(path),
            "own_rows": True,
            "sidecars": [{"files": str(tmp_path / "side/*.parquet"), "columns": ["punsafe"]}],
        },
        partitions=3,
        filters={"unknown_unsafe": policy},
    )
    safe = {n for n in range(40) if n % 5 and n != 1}
    expected = safe if policy == "drop" else safe | set(range(40, 60))
    assert {int(row["original_id"]) for row in found} == expected
    assert report["dropped"]["unsafe"] == 9
    assert report["dropped"]["unknown_unsafe"] == (20 if policy == "drop" else 0)


@pytest.mark.parametrize(("on", "key"), [("url", "url"), ("id", "id")])
def test_a_sidecar_is_joined_by_url_or_id(tmp_path: Path, on: str, key: str) -> None:
    rows = [coyo(n) for n in range(20)]
    table = metadata.write(tmp_path / "a.parquet", metadata.COYO_700M, rows)
    scores = [(row[key], 0.9 if n < 5 else 0.1) for n, row in enumerate(rows)]
    kind = pa.string() if on == "url" else pa.int64()
    files = sidecar(tmp_path / "side" / "0.parquet", scores, kind)
    found, _ = merged(
        tmp_path,
        {
            "files": str(table),
            "columns": {"url": "url", "caption": "text", "id": "id", "unsafe": "punsafe"},
            "sidecars": [{"files": files, "on": on, "columns": ["punsafe"]}],
        },
    )
    assert {int(row["original_id"]) for row in found} == set(range(5, 20))


def test_a_sidecar_without_its_column_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", metadata.COYO_700M, [coyo(1)])
    files = sidecar(tmp_path / "side" / "0.parquet", [(1, 0.5)], pa.int64())
    with pytest.raises(InputError, match="sidecar of source 'mine' has no column 'pwatermark'"):
        merged(
            tmp_path,
            {"files": str(path), "sidecars": [{"files": files, "columns": ["pwatermark"]}]},
        )


def test_a_missing_blocklist_is_one_sentence(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", metadata.COYO_700M, [coyo(1)])
    lists = {"blocklists": {"urls": [str(tmp_path / "none.txt")]}}
    with pytest.raises(InputError, match=r"blocklist .*none.txt cannot be read"):
        merged(tmp_path, {"files": str(path)}, filters=lists)


@pytest.mark.parametrize(
    ("kind", "entry", "wanted"),
    [
        ("domains", "0.0.0.0 1.example", "line 2: '@@||1.example^' is not a host name"),
        ("urls", "1.example/a.jpg", "line 2: '@@||1.example^' is not a URL"),
    ],
)
def test_a_line_of_a_blocklist_that_is_not_understood_is_refused_by_its_number(
    kind: str, entry: str, wanted: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.parquet", metadata.COYO_700M, [coyo(1)])
    (tmp_path / "list.txt").write_text(f"{entry}\n@@||1.example^\n")
    lists = {"blocklists": {kind: [str(tmp_path / "list.txt")]}}
    with pytest.raises(InputError, match=re.escape(wanted)):
        merged(tmp_path, {"files": str(path)}, filters=lists)


def test_a_blocklist_at_a_url_of_no_known_kind_is_one_sentence(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", metadata.COYO_700M, [coyo(1)])
    lists = {"blocklists": {"hashes": ["nothing://a/list.txt"]}}
    with pytest.raises(InputError, match=r"nothing://a/list.txt cannot be read"):
        merged(tmp_path, {"files": str(path)}, filters=lists)


def test_entries_of_blocklists_that_match_no_row_are_named_in_the_report(tmp_path: Path) -> None:
    rows = [{**coyo(number), "url": f"http://img{number}.bad.example/x"} for number in range(3)]
    rows.append({**coyo(3), "url": "http://[::1]:8080/x"})
    path = write(tmp_path / "a.parquet", metadata.COYO_700M, [*rows, coyo(4), coyo(5)])
    (tmp_path / "hosts").write_text("0.0.0.0 bad.example absent.example\n[::1]\n")
    (tmp_path / "urls").write_text("https://img1.bad.example/x\nabsent.example/y\n")
    digest = hashlib.md5(coyo(4)["url"].encode()).hexdigest().upper()
    (tmp_path / "hashes").write_text(f"md5:{digest}  a.jpg\n{'0' * 32}\n")
    lists = {kind: [str(tmp_path / kind)] for kind in ("urls", "hashes")}
    lists["domains"] = [str(tmp_path / "hosts")]
    merged(tmp_path, {"files": str(path)}, filters={"blocklists": lists})
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["blocked_nothing"] == ["0" * 32, "absent.example", "absent.example/y"]
    assert report["total"]["dropped"]["blocked_domain"] == 3
    assert report["total"]["dropped"]["blocked_hash"] == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('\ufeffid,URL,added\n# one\n1,"http://1.example/a.jpg",x\n', None),
        ('# title\n# "id","url"\n"1","http://1.example/a.jpg"\n', None),
        ("id,address\n1,http://1.example/a.jpg\n", "has no column url"),
        ("url\n\nftp://1.example\n", "line 3: 'ftp://1.example' is not a URL"),
        ("id,url\n1\n", "line 2: '1' is not a URL"),
        ("", None),
    ],
)
def test_a_blocklist_may_be_a_csv_with_a_header(
    text: str, sentence: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "list.csv"
    path.write_text(text)
    entry = BLOCKED_TABLES["blocked_addresses"]
    if sentence is None:
        assert read_lists([str(path)], entry) == (["http://1.example/a.jpg"] if text else [])
        return
    with pytest.raises(InputError, match=sentence):
        read_lists([str(path)], entry)


def test_everything_a_merge_reads_is_named_once() -> None:
    config = MergeConfig.from_mapping(
        {
            "sources": [
                {
                    "name": "a",
                    "files": "x",
                    "diff_against": "y",
                    "sidecars": [{"files": "z", "columns": ["punsafe"]}],
                }
            ],
            "filters": {"blocklists": {"domains": ["d"], "hashes": ["h", "i"]}},
        },
        where="test",
    )
    found = list(outside_files(config))
    assert [outside.files for outside in found] == ["x", "y", "z", "d", "h", "i"]
    assert len({outside.role for outside in found}) == 6


def test_inspect_tells_schema_counts_and_gaps(tmp_path: Path) -> None:
    for part in range(3):
        rows = [coyo(n, watermark_score=n / 10 if n else None) for n in range(10)]
        write(tmp_path / f"{part}.parquet", metadata.COYO_700M, rows)
    found = inspect_files(str(tmp_path / "*.parquet"), read_files=2)
    assert (found.files, found.rows, found.read_files, found.read_rows) == (3, 30, 2, 20)
    column = {column.name: column for column in found.columns}["watermark_score"]
    assert (column.part, column.null_share) == ("watermark", pytest.approx(0.1))
    assert found.problem is None


def test_a_folder_of_metadata_is_asked_for_by_its_files(tmp_path: Path) -> None:
    write(tmp_path / "part [1].parquet", metadata.LAION_2B, [laion(1)])
    with pytest.raises(InputError, match=r"of a folder name FOLDER/\*\.parquet"):
        inspect_files(str(tmp_path))
    named = str(tmp_path / "part [1].parquet")
    assert find_metadata(named, "test") == [named], "a name that is there is no pattern"


def test_inspect_says_what_keeps_files_from_being_a_source(tmp_path: Path) -> None:
    pq.write_table(pa.table({"adress": ["http://a"], "text": ["x"]}), tmp_path / "a.parquet")
    assert "no column 'URL' for its url" in str(inspect_files(str(tmp_path / "a.parquet")).problem)
    write(tmp_path / "b.parquet", metadata.LAION_2B, [laion(1)])
    assert "diff_against" in str(inspect_files(str(tmp_path / "b.parquet")).problem)
    with pytest.raises(InputError, match="has other columns than"):
        inspect_files(str(tmp_path / "*.parquet"))
