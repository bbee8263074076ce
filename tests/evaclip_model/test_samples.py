"""The sample format, on tars written by webdataset."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import webdataset

from evaclip_model.errors import InputError
from evaclip_model.reading.samples import BrokenShard, Shard, ShardManifest, read_samples


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
    assert (first.key, first.extension, first.caption) == ("000", "jpg", "a 000")
    assert first.image == b"\xff\xd8000"
    assert second.caption == "ein Würfel 🎲"
    assert second.record == {"uid": "uid-001", "source": "coyo700m"}


def test_a_truncated_tar_is_broken(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [stored("000"), stored("001", jpg=b"x" * 5000)])
    path.write_bytes(path.read_bytes()[:-12_000])
    with pytest.raises(BrokenShard, match=r"0\.tar"):
        list(read_samples(path))


@pytest.mark.parametrize(
    "sample",
    [
        {"__key__": "7", "txt": "no picture", "json": "{}"},
        {"__key__": "7", "jpg": b"x", "json": "{}"},
        stored("7", json="{"),
        stored("7", json=json.dumps({"source": "x"})),
    ],
)
def test_a_sample_that_lacks_something_is_named(tmp_path: Path, sample: dict[str, object]) -> None:
    path = write_tar(tmp_path / "0.tar", [sample])
    with pytest.raises(BrokenShard, match="sample 7"):
        list(read_samples(path))


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


@pytest.mark.parametrize("path", ["pipe:rm x.tar", "/etc/x.tar", "http://host/x.tar", "x"])
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
