"""Shards on a real S3 server, adopted where they lie: `make check-infra` starts one.

EVACLIP_TEST_S3_URL is its address; AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY open it.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from evaclip_model.errors import InputError
from evaclip_model.reading.config import SamplingConfig
from evaclip_model.reading.reader import BatchReader, ReadSettings
from tasks.adopt.adopt import inspect_source
from tasks.artifacts.artifact import Address, produce_artifact
from tasks.dataset.config import DatasetConfig, OutsideFiles
from tasks.dataset.dataset import Takedowns, make_dataset
from tasks.index.adopted_shards import read_adopted
from tasks.progress import report_nothing
from tasks.verify.config import STAGE, VerifyConfig
from tasks.verify.verify import verify_shards
from tests.tasks.adopt.test_adopt import adopted, pack, stranger

URL = os.environ.get("EVACLIP_TEST_S3_URL", "")
pytestmark = [
    pytest.mark.skipif(not URL, reason="EVACLIP_TEST_S3_URL names no S3 server"),
    pytest.mark.timeout(300),
]
CONFIG = SamplingConfig(image_px=16, global_batch=8, lanes=4, shuffle_buffer=4)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket of its own."""
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL", URL)
    monkeypatch.setenv("AWS_DEFAULT_REGION", os.environ.get("AWS_DEFAULT_REGION", "us-east-1"))
    name = f"evaclip-{uuid.uuid4().hex[:12]}"
    store = boto3.resource("s3", endpoint_url=URL).Bucket(name)
    store.create()
    yield name
    store.objects.all().delete()
    store.delete()


def put(bucket: str, file: Path, key: str) -> None:
    import boto3

    boto3.client("s3", endpoint_url=URL).upload_file(str(file), bucket, key)


def captions_of(place: Path, settings: ReadSettings) -> list[str]:
    reader = BatchReader(place / "shards.json", CONFIG, rank=0, ranks=1, settings=settings)
    with closing(reader):
        return [text for batch in reader.iterate_batches(0, 3) for text in batch.captions]


def dataset_of(files: str, root: Path) -> Path:
    """A version of what lies at `files`, adopted and verified."""
    adopted(root / "adopt", files)
    address = Address.of(root, STAGE, VerifyConfig(), {"adopt": files})
    verified = produce_artifact(
        address, lambda out: verify_shards(VerifyConfig(), root / "adopt", out, 1, report_nothing)
    )
    out = root / "dataset/v"
    out.mkdir(parents=True)
    make_dataset(DatasetConfig(), [verified], OutsideFiles(), Takedowns(), out, report_nothing)
    return out


def test_shards_in_a_bucket_are_adopted_verified_and_read_where_they_lie(
    bucket: str, tmp_path: Path
) -> None:
    for number in range(2):
        samples = [stranger(n) for n in range(number * 10, number * 10 + 10)]
        tar = pack(tmp_path / f"here/{number}.tar", samples)
        put(bucket, tar, f"mine/{number}.tar")
    found = inspect_source(f"s3://{bucket}/mine/*.tar")
    assert found is not None
    assert (found.form, found.files, found.left.pairs, found.is_cut_short) == (
        "shards",
        2,
        10,
        True,
    )
    remote = dataset_of(f"s3://{bucket}/mine/{{0..1}}.tar", tmp_path / "remote")
    listed = [shard.location for shard in read_adopted(tmp_path / "remote/adopt")]
    assert listed == [f"s3://{bucket}/mine/{number}.tar" for number in range(2)]
    assert not list((tmp_path / "remote").rglob("*.tar")), "nothing is copied"
    local = dataset_of(str(tmp_path / "here"), tmp_path / "local")
    cache = ReadSettings(shard_cache=tmp_path / "cache", shard_cache_bytes=2**24)
    assert captions_of(remote, cache) == captions_of(local, ReadSettings())


def test_a_shard_that_was_put_anew_and_a_bucket_without_a_key_are_one_sentence(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(bucket, pack(tmp_path / "0.tar", [stranger(0)]), "0.tar")
    adopted(tmp_path / "out", f"s3://{bucket}/0.tar")
    put(bucket, pack(tmp_path / "1.tar", [stranger(1)]), "0.tar")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    (tmp_path / "verified").mkdir()
    with pytest.raises(InputError, match="1 of 1 adopted shards changed"):
        verify_shards(VerifyConfig(), tmp_path / "out", tmp_path / "verified", 1, report_nothing)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(InputError, match=r"cannot be listed .*: check the address"):
        inspect_source(f"s3://{bucket}/*.tar")
    s3fs.S3FileSystem.clear_instance_cache()
