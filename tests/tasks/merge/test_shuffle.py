from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.merge.shuffle import TEXT, is_alone, read_keys, read_rows, write_rows


def key_of(number: int) -> str:
    return hashlib.md5(str(number).encode()).hexdigest()


def uuids(numbers: list[int | None]) -> pa.Array:
    stored = [None if number is None else bytes.fromhex(key_of(number)) for number in numbers]
    return pa.ExtensionArray.from_storage(pa.uuid(), pa.array(stored, pa.binary(16)))


def judged(first: int, rows: int) -> pa.RecordBatch:
    """A run as the scan gives it: every third row is dropped."""
    numbers = range(first, first + rows)
    passes = [number % 3 != 0 for number in numbers]
    columns = {
        "row_in_file": pa.array(numbers, pa.int64()),
        "reason": pa.array([None if passing else "unsafe" for passing in passes]),
        "key": uuids([n if p else None for n, p in zip(numbers, passes, strict=True)]),
        "url": [f"http://a/{n}" if p else None for n, p in zip(numbers, passes, strict=True)],
        "caption": [f"ü {n}" if p else None for n, p in zip(numbers, passes, strict=True)],
        "image_hash": [f"{n:032x}" if p else None for n, p in zip(numbers, passes, strict=True)],
        "original_id": [None if n % 5 == 0 else str(n) for n in numbers],
        "similarity": pa.array([n / 100 for n in numbers]),
        "width_hint": pa.array(numbers, pa.int64()),
        "height_hint": pa.array([None] * rows, pa.int64()),
    }
    for name in ("url", "caption", "image_hash", "original_id"):
        columns[name] = pa.array(columns[name], TEXT)
    return pa.RecordBatch.from_pydict(columns)


@pytest.mark.parametrize("partitions", [1, 3, 2048])
def test_every_passing_row_is_in_the_partition_of_its_key_and_nowhere_else(
    tmp_path: Path, partitions: int
) -> None:
    # the second run is a part of a longer one: its buffers do not begin with it
    write_rows([judged(0, 70), judged(50, 80).slice(20)], tmp_path, 1, partitions)
    seen: Counter[int] = Counter()
    for part in range(partitions):
        keys = read_keys(tmp_path, 1, 4, part, partitions)
        texts = read_rows(tmp_path, "texts", part, partitions)
        rows = zip(keys.to_pylist(), texts.to_pylist(), strict=True)
        for place, (key, text) in enumerate(rows):
            number = key["row_in_file"]
            seen[number] += 1
            assert key["key"].hex == key_of(number)
            assert int(key_of(number)[:4], 16) == key["bucket"]
            assert key["bucket"] * partitions >> 16 == part
            assert (key["source"], key["file"], key["place"]) == (1, 4, place)
            assert key["original_id"] == (None if number % 5 == 0 else str(number))
            assert text == {
                "url": f"http://a/{number}",
                "caption": f"ü {number}",
                "image_hash": f"{number:032x}",
                "width_hint": number,
                "height_hint": None,
            }
    assert seen == Counter(number for number in range(130) if number % 3)
    assert pq.read_table(tmp_path / "reasons.parquet").to_pylist() == [
        {"source": 1, "reason": "unsafe", "rows": 44}
    ]


def test_a_file_of_which_nothing_passes_or_that_has_no_row_is_read_as_empty(tmp_path: Path) -> None:
    for name, runs in {"dropped": [judged(0, 1)], "empty": []}.items():
        (tmp_path / name).mkdir()
        write_rows(runs, tmp_path / name, 0, 2)
        for part in range(2):
            assert len(read_keys(tmp_path / name, 0, 0, part, 2)) == 0
            assert len(read_rows(tmp_path / name, "texts", part, 2)) == 0


def test_partitions_that_get_no_row_of_a_run_cost_no_copy_of_it(tmp_path: Path) -> None:
    write_rows([judged(0, 3_000)], tmp_path, 0, 2048)
    empty = sum(not len(read_rows(tmp_path, "texts", part, 2048)) for part in range(2048))
    assert empty > 500
    assert (tmp_path / "texts.arrows").stat().st_size < 2048 * 2_000


def test_alone_is_who_has_no_twin_wherever_the_twin_lies() -> None:
    numbers = [5, 3, 5, 8, 3, 9, 3]
    whole = pa.table({"key": uuids(numbers)})
    pieces = pa.concat_tables([whole.slice(0, 3), whole.slice(3, 0), whole.slice(3)])
    expected = [False, False, False, True, False, True, False]
    assert is_alone(whole).tolist() == is_alone(pieces).tolist() == expected
    assert is_alone(whole.slice(0, 0)).dtype == np.bool_
