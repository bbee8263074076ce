"""The table of what became of every source's rows."""

from pathlib import Path

from flows.reporting.prefect_artifacts import per_source
from tasks.artifacts.artifact import Artifact


def artifact(kind: str, **counts: int) -> Artifact:
    named = {name.replace("__", "."): count for name, count in counts.items()}
    about = {"digest": kind, "parents": {}, "config": {}, "files": {}, "created": "now"}
    return Artifact.from_mapping(
        {"kind": kind, "folder": Path(kind), "counts": named, **about}, where=kind
    )


def test_a_source_is_a_row_from_metadata_to_dataset_and_the_largest_comes_first() -> None:
    merged = artifact("merge", a__rows_read=9, a__selected=5, b__rows_read=8, b__selected=7)
    downloaded = artifact("download", a__samples=4, b__samples=6)
    rows = per_source((merged, downloaded), artifact("dataset", a__samples=3, b__samples=6))
    names = ("source", "rows of metadata", "selected", "downloaded", "in the dataset")
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("b", 8, 7, 6, 6),
        ("a", 9, 5, 4, 3),
    ]


def test_a_source_of_which_nothing_is_left_is_a_row_of_zeros() -> None:
    merged = artifact("merge", a__rows_read=9)
    (row,) = per_source((merged, artifact("download")), artifact("dataset"))
    assert (row["rows of metadata"], row["selected"], row["in the dataset"]) == (9, 0, 0)


def test_a_retraining_counts_what_earlier_ones_brought() -> None:
    made = [
        artifact("merge", a__rows_read=9, a__selected=5),
        artifact("download", a__samples=4),
        artifact("merge", a__rows_read=3, a__selected=2, b__rows_read=8, b__selected=7),
        artifact("download", a__samples=1, b__samples=6),
        artifact("verify", a__samples=100),
    ]
    rows = per_source(made, artifact("dataset", a__samples=4, b__samples=6))
    names = ("source", "rows of metadata", "selected", "downloaded", "in the dataset")
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("b", 8, 7, 6, 6),
        ("a", 12, 7, 5, 4),
    ]
