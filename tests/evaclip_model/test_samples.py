"""The sample format, on tars written by webdataset."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest
import webdataset

from evaclip_model.errors import InputError
from evaclip_model.reading.samples import (
    BrokenShard,
    SampleReader,
    Shard,
    ShardManifest,
    read_samples,
)


def write_tar(path: Path, samples: list[dict[str, object]]) -> Path:
    with webdataset.TarWriter(str(path)) as tar:
        for sample in samples:
            tar.write(sample)
    return path


def stored(key: str, **changes: object) -> dict[str, object]:
    record = {"uid": f"uid-{key}", "source": "coyo700m"}
    return {"__key__": key, "jpg": b"\xff\xd8" + key.encode(), "txt": f"a {key}"} | {
        "json": json.dumps(record),
        **changes,
    }


def shard(path: str, source: str = "laion2b", samples: int = 3) -> Shard:
    return Shard(path=path, source=source, samples=samples, bytes=10, sha256="0" * 64)


def test_samples_come_back_as_they_were_stored(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [stored("000"), stored("001", txt="ein Würfel 🎲")])
    first, second = read_samples(path)
    assert (first.key, first.caption, first.flaw) == ("000", "a 000", None)
    assert first.image == b"\xff\xd8000"
    assert second.caption == "ein Würfel 🎲"
    assert second.record == {"uid": "uid-001", "source": "coyo700m"}


def test_a_truncated_tar_is_broken(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [stored("000"), stored("001", jpg=b"x" * 5000)])
    path.write_bytes(path.read_bytes()[:-12_000])
    with pytest.raises(BrokenShard, match=r"0\.tar"):
        list(read_samples(path))


@pytest.mark.parametrize(
    ("changes", "flaw"),
    [
        ({"jpg": None}, "no_image"),
        ({"jpg": None, "jpeg": b"x"}, None),
        ({"png": b"x"}, "several_images"),
        ({"txt": None}, "no_caption"),
        ({"txt": b"caf\xe9"}, "caption_not_utf8"),
        ({"json": None}, None),
        ({"json": "{"}, "unreadable_record"),
        ({"json": "[" * 100_000}, "unreadable_record"),
        ({"json": "7"}, "unreadable_record"),
        ({"json": json.dumps({"source": "x"})}, None),
    ],
)
def test_a_flawed_sample_is_told_and_its_neighbours_are_read(
    tmp_path: Path, changes: dict[str, object], flaw: str | None
) -> None:
    one = {name: value for name, value in stored("1", **changes).items() if value is not None}
    path = write_tar(tmp_path / "0.tar", [stored("0"), one, stored("2")])
    assert [sample.flaw for sample in read_samples(path)] == [None, flaw, None]
    with closing(SampleReader(path)) as pairs:
        read = pairs.read(0, 3)
    record_alone = flaw == "unreadable_record"
    assert [pair.flaw for pair in read] == [None, None if record_alone else flaw, None]
    assert [pair.caption for pair in read][::2] == ["a 0", "a 2"]


def test_a_manifest_survives_writing_and_groups_by_source(tmp_path: Path) -> None:
    manifest = ShardManifest(
        shards=(shard("shards/0.tar"), shard("shards/1.tar", "coyo700m", 5), shard("shards/2.tar"))
    )
    manifest.write(tmp_path / "shards.json")
    again = ShardManifest.read(tmp_path / "shards.json")
    assert again == manifest
    assert again.samples == 11
    assert list(again.by_source()) == ["coyo700m", "laion2b"]
    assert [one.path for one in again.by_source()["laion2b"]] == ["shards/0.tar", "shards/2.tar"]
    assert [path.name for path in tmp_path.iterdir()] == ["shards.json"]


def test_a_shard_may_lie_at_a_url_of_a_store() -> None:
    assert shard("s3://bucket/a/0.tar").path == "s3://bucket/a/0.tar"


@pytest.mark.parametrize(
    "path",
    [
        *("pipe:rm x.tar", "pipe://rm x.tar", "/etc/x.tar", "file:///etc/x.tar", "s3:0.tar", "x"),
        *("simplecache::s3://bucket/x.tar", "s3://bucket/x"),
    ],
)
def test_a_shard_that_is_no_relative_path_of_a_tar_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="relative to the manifest"):
        shard(path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"shards": []}', '{"shards": [{"path": 1}]}'])
def test_a_wrong_manifest_is_one_sentence_with_its_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "shards.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"shards\.json") as caught:
        ShardManifest.read(path)
    assert "\n" not in str(caught.value)


def test_a_missing_manifest_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        ShardManifest.read(tmp_path / "shards.json")
