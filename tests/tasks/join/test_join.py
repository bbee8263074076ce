"""Several verifications as one: what a dataset makes of it, and what a takedown and a kill do."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaclip_model.config import Config
from tasks.artifacts.artifact import Address, Artifact, produce_artifact
from tasks.dataset.config import DatasetConfig, OutsideFiles
from tasks.dataset.dataset import Takedowns, make_dataset
from tasks.index import sample_index
from tasks.index.sample_index import INDEX, Kind, SampleIndex, read_verdicts
from tasks.join.config import STAGE
from tasks.join.join import JoinedPart, join_verifications, read_parts
from tasks.progress import report_nothing
from tasks.verify.config import STAGE as VERIFY, VerifyConfig
from tasks.verify.verify import verify_shards
from tests.tasks.dataset.test_dataset import (
    Images,
    picture,
    takedowns_of,
    uids_read,
    url_of,
    write_shard,
)

WEEKS: list[list[tuple[str, Images]]] = [
    [("laion2b", {"a0": picture(0), "a1": picture(1)}), ("coyo700m", {"b0": picture(10)})],
    [("laion2b", {"c0": picture(20), "c1": picture(1), "bad": b"no image"})],
    [("coyo700m", {"d0": picture(30), "a0": picture(31)})],
]
"""c1 has a1's image; the third week's a0 has the uid of the first week's."""


@pytest.fixture
def weeks(tmp_path: Path) -> list[Artifact]:
    return [verified(tmp_path / "runs", f"d{n}", shards) for n, shards in enumerate(WEEKS)]


def verified(root: Path, name: str, shards: list[tuple[str, Images]]) -> Artifact:
    downloaded = root / "download" / name
    for number, (source, images) in enumerate(shards):
        write_shard(downloaded, f"{number:06d}", source, images)
    config = VerifyConfig(max_bad_share=0.9)
    address = Address.of(root, VERIFY, config, {"download": name})
    return produce_artifact(
        address, lambda out: verify_shards(config, downloaded, out, 2, report_nothing)
    )


def joined(parts: list[Artifact]) -> Artifact:
    root = parts[0].folder.parents[1]
    parents = {f"part{n}": part.digest for n, part in enumerate(parts)}
    address = Address.of(root, STAGE, Config(), parents)
    return produce_artifact(address, lambda out: join_verifications(parts, out, report_nothing))


def dataset_of(data: Artifact, name: str, takedowns: Takedowns | None = None) -> Path:
    out = data.folder.parents[1] / "dataset" / name
    out.mkdir(parents=True)
    none = takedowns or Takedowns()
    make_dataset(DatasetConfig(), [data], OutsideFiles(), none, out, report_nothing)
    return out


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != ".lock" and path.name != "manifest.json"
    }


def test_the_index_counts_through_and_finds_what_each_part_has(weeks: list[Artifact]) -> None:
    data = joined(weeks)
    index = SampleIndex(data.folder)
    rows = [
        row
        for table in index.iterate_chunks("row", "shard", "place", "uid")
        for row in table.to_pylist()
    ]
    assert [row["row"] for row in rows] == list(range(index.rows))
    shards = read_verdicts(data.folder)
    for row in rows:
        (found,) = [
            one for one in index.find_samples(Kind.UID, [row["uid"]]) if one["row"] == row["row"]
        ]
        assert found["shard"] == row["shard"] < len(shards)
    assert [row["uid"] for row in rows] == [
        uid for week in WEEKS for _, images in week for uid in images
    ]
    assert [len(index.find_samples(Kind.URL, [url_of(uid)])) for uid in ("a0", "b0", "c1")] == [
        2,
        1,
        1,
    ]


def test_exact_duplicates_and_repeated_uids_are_left_out_across_downloads(
    weeks: list[Artifact],
) -> None:
    kept = uids_read(dataset_of(joined(weeks), "v"))
    assert kept == ["a0", "a1", "b0", "c0", "d0"]


def test_a_takedown_reaches_every_download(weeks: list[Artifact]) -> None:
    kept = uids_read(dataset_of(joined(weeks), "v", takedowns_of("a0", url_of("a1"))))
    assert kept == ["b0", "c0", "d0"], "c1 has a1's image"


def test_a_later_week_takes_nothing_out_of_an_earlier_version(weeks: list[Artifact]) -> None:
    first = uids_read(dataset_of(joined(weeks[:2]), "first"))
    second = uids_read(dataset_of(joined(weeks), "second"))
    assert second[: len(first)] == first


def test_a_join_says_where_each_part_begins_and_links_what_is_at_the_front(
    weeks: list[Artifact],
) -> None:
    data = joined(weeks)
    assert read_parts(data.folder) == [
        JoinedPart(weeks[0].digest, 0, 0),
        JoinedPart(weeks[1].digest, 3, 2),
        JoinedPart(weeks[2].digest, 6, 3),
    ]
    first = data.folder / INDEX / "rows" / "00000.parquet"
    assert first.samefile(weeks[0].folder / INDEX / "rows" / "00000.parquet")


def test_what_a_killed_join_left_changes_no_byte(weeks: list[Artifact], tmp_path: Path) -> None:
    whole, torn = tmp_path / "runs/join/whole", tmp_path / "runs/join/torn"
    for out in (whole, torn):
        out.mkdir(parents=True)
    join_verifications(weeks, whole, report_nothing)
    rows = torn / INDEX / "rows"
    rows.mkdir(parents=True)
    (rows / "00000.parquet").hardlink_to(whole / INDEX / "rows" / "00000.parquet")
    (rows / ".00001.parquet.1").write_bytes(b"torn")
    join_verifications(weeks, torn, report_nothing)
    (rows / ".00001.parquet.1").unlink()
    assert digests(torn) == digests(whole)


def test_the_index_of_a_join_is_that_of_one_verification_of_all(
    weeks: list[Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = [shard for week in WEEKS for shard in week]
    at_once = verified(tmp_path / "at-once", "d", shards)
    monkeypatch.setattr(sample_index, "_MARKED", {})  # marks are the parts', not made again
    data = joined(weeks)
    names = ("row", "shard", "place", "uid", "source", "url", "stored_sha256", "phash", "flaw")
    ours, theirs = (
        pa.concat_tables(SampleIndex(folder).iterate_chunks(*names)).combine_chunks()
        for folder in (data.folder, at_once.folder)
    )
    assert ours.equals(theirs)
    for kind in Kind:
        tables = [
            pq.read_table(folder / INDEX / f"by_{kind}.parquet")
            for folder in (data.folder, at_once.folder)
        ]
        # DuckDB 2 marks columns without nulls, in one of them.
        assert tables[0].cast(tables[1].schema).equals(tables[1])
