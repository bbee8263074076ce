"""The index of stored samples: made from tables a shard, searched, and asked for repetitions."""

from __future__ import annotations

import hashlib
import os
from itertools import pairwise
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.index import sample_index
from tasks.index.sample_index import COLUMNS, INDEX, Kind, SampleIndex, write_index


def sha256(text: object) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()


def row(number: int, **changes: object) -> dict[str, object]:
    return {
        "key": f"{number:06d}",
        "uid": f"uid-{number}",
        "source": "laion2b",
        "original_id": str(number),
        "url": f"https://a.example/{number}.jpg",
        "sha256": sha256(number),
        "stored_sha256": sha256(f"stored {number}"),
        "md5": sha256(number)[:32],
        "phash": number,
        "flaw": None,
        **changes,
    }


def write_tables(folder: Path, shards: list[list[dict[str, object]]]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    files = []
    for number, rows in enumerate(shards):
        files.append(folder / f"{number}.parquet")
        pq.write_table(pa.Table.from_pylist(rows, schema=COLUMNS), files[-1])
    return files


def index_of(folder: Path, *shards: list[dict[str, object]]) -> SampleIndex:
    write_index(write_tables(folder, list(shards)), folder / INDEX, "200MB")
    return SampleIndex(folder)


def find_repeated(
    index: SampleIndex, kind: Kind, *, without: int | None = None
) -> tuple[list[int], ...]:
    """All rows of one kind, what they share and its first row, but for a row that is not asked."""
    among = np.arange(index.rows) != (-1 if without is None else without)
    return tuple(np.hstack(list(index.find_repeated(kind, among))).tolist())


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several files and row groups, for a few hundred rows."""
    monkeypatch.setattr(sample_index, "ROWS_PER_FILE", 250)
    monkeypatch.setattr(sample_index, "ROWS_PER_GROUP", 64)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Kind.UID, "uid-307"),
        (Kind.URL, "https://a.example/307.jpg"),
        (Kind.URL, "http://a.example/307.jpg"),
        (Kind.HASH, sha256(307)),
        (Kind.HASH, sha256("stored 307")),
        (Kind.HASH, sha256(307)[:32]),
    ],
)
def test_a_sample_is_found_by_each_of_its_names(
    tmp_path: Path, small_groups: None, kind: Kind, value: str
) -> None:
    index = index_of(tmp_path, *[[row(100 * s + n) for n in range(100)] for s in range(5)])
    assert len(index.files) > 1
    (found,) = index.find_samples(kind, [value])
    assert found == {"row": 307, "shard": 3, "place": 7, **row(307)}


def test_many_are_found_at_once_and_what_is_not_there_is_not(tmp_path: Path) -> None:
    index = index_of(tmp_path, [row(number) for number in range(50)])
    asked = [f"uid-{number}" for number in (3, 49, 50, 3)]
    assert [found["row"] for found in index.find_samples(Kind.UID, asked)] == [3, 49]
    assert index.find_samples(Kind.UID, []) == index.find_samples(Kind.HASH, ["uid-3"]) == []


def test_only_those_parts_of_a_look_up_table_are_read_that_may_hold_what_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_index, "LOOKUP_ROWS_PER_GROUP", 2048)
    index = index_of(tmp_path, [row(number) for number in range(3 * 2048)])
    path = tmp_path / INDEX / "by_uid.parquet"
    with pq.ParquetFile(path) as parquet:
        ends = [parquet.read_row_group(group)["row"].to_pylist()[:300] for group in (0, 2)]
        middle = parquet.metadata.row_group(1).column(0)
    with path.open("r+b") as file:
        file.seek(middle.data_page_offset)
        file.write(b"\xff" * middle.total_compressed_size)
    rows = sorted(ends[0] + ends[1])
    found = index.find_samples(Kind.UID, [f"uid-{number}" for number in rows])
    assert [one["row"] for one in found] == rows


def test_look_up_tables_are_in_order_and_hold_every_row(tmp_path: Path, small_groups: None) -> None:
    index = index_of(tmp_path, [row(number) for number in range(400)])
    for kind, names in ((Kind.UID, 1), (Kind.URL, 1), (Kind.HASH, 3)):
        table = pq.read_table(tmp_path / INDEX / f"by_{kind}.parquet")
        marks = table["mark"].to_numpy()
        assert (np.diff(marks.astype(object)) >= 0).all()
        assert sorted(table["row"].to_pylist()) == sorted(list(range(index.rows)) * names)


def test_rows_that_share_a_uid_or_an_image_are_found_with_what_they_share(tmp_path: Path) -> None:
    same = sha256("the same")
    index = index_of(
        tmp_path,
        [row(0, stored_sha256=same), row(1, uid="uid-2"), row(2)],
        [row(3, sha256=None, stored_sha256=same), row(4), row(5, sha256=sha256(4))],
        [row(6, sha256=None), row(7, sha256=None)],
    )
    rows, groups, first = find_repeated(index, Kind.UID)
    assert rows == [1, 2]
    assert len(set(groups)) == 1
    assert first == [1, 1]
    rows, groups, first = find_repeated(index, Kind.HASH)
    assert rows == [0, 3, 4, 5]
    assert groups[0] == groups[1] != groups[2] == groups[3]
    assert first == [0, 0, 4, 4]
    assert find_repeated(index, Kind.HASH, without=0)[0] == [4, 5]
    with pytest.raises(ValueError, match="may well share a url"):
        find_repeated(index, Kind.URL)


def test_repeated_rows_come_in_batches_none_of_which_ends_within_a_row(
    tmp_path: Path, small_groups: None
) -> None:
    def chained(number: int) -> dict[str, object]:
        """A row that shares its download with one neighbour, and what is stored with the other."""
        stored = sha256(f"stored {(number + 1) // 2}")
        return row(number, sha256=sha256(number // 2), stored_sha256=stored, md5=None)

    index = index_of(tmp_path, *[[chained(100 * s + n) for n in range(100)] for s in range(6)])
    batches = list(index.find_repeated(Kind.HASH, np.ones(600, np.bool_)))
    assert len(index.files) == 2
    assert max(batch.shape[1] for batch in batches) <= 65  # a row more than a row group has
    rows, groups, first = np.hstack(batches)
    assert rows.tolist() == sorted([*range(600), *range(1, 599)])
    assert len(set(groups.tolist())) == 599
    assert set((rows - first).tolist()) == {0, 1}
    assert all(not set(one[0]) & set(other[0]) for one, other in pairwise(batches))


def test_rows_with_equal_marks_are_found_across_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks, rows = [3, 3, 3, 4, 5, 5, 6, 7, 7], [8, 1, 3, 7, 0, 5, 2, 4, 6]
    table = pa.table({"mark": pa.array(marks, pa.uint64()), "row": rows})
    for size in (1, 2, 3):
        pq.write_table(table, tmp_path / "by_hash.parquet", row_group_size=size)
        for at_once in (1, 2, 16):
            monkeypatch.setattr(sample_index, "GROUPS_AT_ONCE", at_once)
            found = sample_index._rows_with_equal_marks(tmp_path / "by_hash.parquet", 9)
            assert np.flatnonzero(found).tolist() == [0, 1, 3, 4, 5, 6, 8]


def test_marks_that_collide_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # every uid gets the same mark
    monkeypatch.setitem(sample_index._MARKED, Kind.UID, "SELECT 'uid-1' AS value, row FROM stored")
    index = index_of(tmp_path, [row(0), row(1), row(2)])
    assert [found["row"] for found in index.find_samples(Kind.UID, ["uid-1"])] == [1]
    assert find_repeated(index, Kind.UID) == ([], [], [])


def test_files_are_written_on_all_cores(
    tmp_path: Path, small_groups: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = [[row(100 * s + n) for n in range(100)] for s in range(6)]
    alone = index_of(tmp_path / "alone", *shards)
    together, write_rows = Barrier(2, timeout=60), sample_index._write_rows

    def write_beside_another(*given: Any) -> None:
        together.wait()
        write_rows(*given)

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(sample_index, "_write_rows", write_beside_another)
    beside = index_of(tmp_path / "beside", *shards)
    assert [one.read_bytes() for one in beside.files] == [one.read_bytes() for one in alone.files]


def test_files_that_a_killed_run_finished_are_kept(tmp_path: Path, small_groups: None) -> None:
    tables = write_tables(tmp_path, [[row(100 * s + n) for n in range(100)] for s in range(6)])
    write_index(tables, tmp_path / INDEX, "200MB")
    files = sorted((tmp_path / INDEX).rglob("*.parquet"))
    content = {file: file.read_bytes() for file in files}
    kept_file, *others = (file for file in files if file.parent.name == "rows")
    kept = kept_file.stat().st_mtime_ns
    others[0].unlink()
    (tmp_path / INDEX / "by_url.parquet").unlink()
    write_index(tables, tmp_path / INDEX, "200MB")
    assert {file: file.read_bytes() for file in files} == content
    assert kept_file.stat().st_mtime_ns == kept
