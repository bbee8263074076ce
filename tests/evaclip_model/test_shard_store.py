"""Shards behind a URL: a real server on loopback that is slow, wrong or away; a bounded cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import zlib
from collections import Counter
from contextlib import closing
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
import torch

from evaclip_model.errors import InputError
from evaclip_model.reading.reader import BatchReader, ReadSettings
from evaclip_model.reading.samples import (
    TOMBSTONES,
    Sample,
    Shard,
    ShardManifest,
    append_tombstones,
    read_samples,
)
from evaclip_model.reading.shard_store import ShardStore
from evaclip_model.training.config import TrainConfig

CONFIG = TrainConfig(
    name="x", image_px=16, samples_seen=24 * 30, global_batch=24, lanes=6, shuffle_buffer=4
)


class Web(ThreadingHTTPServer):
    """A folder at an address; `faults` are taken from the front, one a request."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.faults: list[str] = []
        self.asked: Counter[str] = Counter()


class _Handler(SimpleHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        fault = self.server.faults.pop(0) if self.server.faults else ""
        if fault == "503":
            self.send_error(503)
            return
        if fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"x" * 1000)
            return
        if fault == "other":
            self.path = "/b0.tar"
        super().do_GET()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def web(small_shards, tmp_path, monkeypatch):
    """The small shards with their true sums, served on loopback, and tried again at once."""
    monkeypatch.setattr("evaclip_model.reading.shard_store.FIRST_PAUSE_S", 0.01)
    folder = tmp_path / "served"
    shutil.copytree(small_shards, folder)
    shards = []
    for shard in ShardManifest.read(folder / "shards.json").shards:
        digest = hashlib.sha256((folder / shard.path).read_bytes()).hexdigest()
        shards.append(replace(shard, sha256=digest))
    ShardManifest(shards=tuple(shards)).write(folder / "shards.json")
    server = Web(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def shards_of(web: Web):
    return ShardManifest.read(f"{web.url}/shards.json").shards


def store(web: Web, cache: Path, cache_bytes: int = 2**30) -> ShardStore:
    return ShardStore(web.url, cache, cache_bytes)


def read(shards: ShardStore, shard: Shard) -> list[Sample]:
    with closing(shards.open_shard(shard)) as pairs:
        return pairs.read(0, shard.samples)


def test_batches_from_a_url_are_those_from_the_folder(web, small_shards, tmp_path):
    local = BatchReader(
        small_shards / "shards.json", CONFIG, rank=0, ranks=1, settings=ReadSettings()
    )
    size = max(shard.bytes for shard in shards_of(web))
    settings = ReadSettings(shard_cache=tmp_path / "cache", shard_cache_bytes=2 * size)
    remote = BatchReader(f"{web.url}/shards.json", CONFIG, rank=0, ranks=1, settings=settings)
    with closing(remote):
        for ours, theirs in zip(
            remote.iterate_batches(0, 8), local.iterate_batches(0, 8), strict=True
        ):
            assert ours.captions == theirs.captions
            assert torch.equal(ours.images, theirs.images)
    assert not list((tmp_path / "cache").iterdir())


def test_a_manifest_here_may_name_shards_here_and_at_urls(web, small_shards, tmp_path):
    expected = BatchReader(
        small_shards / "shards.json", CONFIG, rank=0, ranks=1, settings=ReadSettings()
    )
    mixed = tuple(
        replace(shard, path=f"{web.url}/{shard.path}") if number % 2 else shard
        for number, shard in enumerate(shards_of(web))
    )
    ShardManifest(shards=mixed).write(tmp_path / "served/mixed.json")
    settings = ReadSettings(shard_cache=tmp_path / "cache", shard_cache_bytes=2**20)
    place = tmp_path / "served/mixed.json"
    with closing(BatchReader(place, CONFIG, rank=0, ranks=1, settings=settings)) as reader:
        for ours, theirs in zip(
            reader.iterate_batches(0, 4), expected.iterate_batches(0, 4), strict=True
        ):
            assert ours.captions == theirs.captions
    assert not list((tmp_path / "cache").iterdir())


def test_a_manifest_copied_to_a_store_finds_shards_beside_its_folder(small_shards, tmp_path):
    copied = fsspec.filesystem("memory")
    here = ShardManifest.read(small_shards / "shards.json").shards
    there = []
    for shard in here:
        content = (small_shards / shard.path).read_bytes()
        copied.pipe(f"memory://bucket/runs/download/d/shards/{shard.path}", content)
        path = f"../../download/d/shards/{shard.path}"
        digest = hashlib.sha256(content).hexdigest()
        with (tmp_path / TOMBSTONES).open("ab") as bits:
            at = append_tombstones(bytes([0b101]), bits)
        there.append(
            replace(shard, path=path, sha256=digest, tombstones_at=at, samples=shard.samples - 2)
        )
    ShardManifest(shards=tuple(there)).write(tmp_path / "shards.json")
    for name in ("shards.json", TOMBSTONES):
        copied.pipe(f"memory://bucket/runs/dataset/e/{name}", (tmp_path / name).read_bytes())
    settings = ReadSettings(shard_cache=tmp_path / "cache", shard_cache_bytes=2**20)
    place = "memory://bucket/runs/dataset/e/shards.json"
    hidden = {
        f"{one.path}/{sample.key}"
        for one in here
        for sample in [*read_samples(small_shards / one.path)][:3:2]
    }
    with closing(BatchReader(place, CONFIG, rank=0, ranks=1, settings=settings)) as reader:
        origins = [origin for step in range(3) for origin in reader.read_batch(step).origins]
    read = {f"{Path(origin.shard).name}/{origin.key}" for origin in origins}
    assert len(origins) == 3 * CONFIG.global_batch
    assert not read & hidden


@pytest.mark.parametrize("content", [None, b"", b"no deflated bits", zlib.compress(bytes(9))[:-3]])
def test_tombstones_that_are_gone_or_damaged_are_one_sentence(small_shards, tmp_path, content):
    folder = shutil.copytree(small_shards, tmp_path / "copy")
    if content is not None:
        (folder / TOMBSTONES).write_bytes(content)
    shards = ShardManifest.read(folder / "shards.json").shards
    ShardManifest(shards=tuple(replace(one, tombstones_at=(0, 99)) for one in shards)).write(
        folder / "shards.json"
    )
    with pytest.raises(InputError, match=r"tombstones\.bin cannot be read as tombstones .*again"):
        BatchReader(
            folder / "shards.json", CONFIG, rank=0, ranks=1, settings=ReadSettings()
        ).read_batch(0)


def test_a_shard_that_changed_since_it_was_verified_is_one_sentence(small_shards, tmp_path):
    folder = shutil.copytree(small_shards, tmp_path / "copy")
    with (folder / "a0.tar").open("ab") as tar:
        tar.write(bytes(512))
    with pytest.raises(InputError, match=r"a0\.tar changed since it was verified: it has"):
        BatchReader(
            folder / "shards.json", CONFIG, rank=0, ranks=1, settings=ReadSettings()
        ).read_batch(0)


def test_a_step_larger_than_the_data_is_refused_with_both_figures(small_shards):
    config = CONFIG.model_copy(update={"global_batch": 96})
    with pytest.raises(InputError, match="global_batch = 96 is larger than the 72 samples of a, b"):
        BatchReader(small_shards / "shards.json", config, rank=0, ranks=1, settings=ReadSettings())


@pytest.mark.parametrize("faults", [["503"], ["cut", "cut"], ["other", "503"]])
def test_a_fetch_that_goes_wrong_is_repeated(web, tmp_path, faults):
    shard = shards_of(web)[0]
    web.faults = [*faults]
    with closing(store(web, tmp_path)) as shards:
        assert len(read(shards, shard)) == shard.samples
        content = (tmp_path / f"{shard.sha256}.tar").read_bytes()
    assert hashlib.sha256(content).hexdigest() == shard.sha256
    assert not list(tmp_path.glob(".*"))


def test_a_shard_that_never_comes_right_is_one_sentence(web, tmp_path):
    shard = shards_of(web)[0]
    (Path(tmp_path, "served") / shard.path).write_bytes(b"short")
    with (
        closing(store(web, tmp_path / "cache")) as shards,
        pytest.raises(InputError, match=r"a0\.tar could not be fetched in 6 attempts: 5 bytes"),
    ):
        shards.open_shard(shard)


def test_a_shard_that_is_not_there_is_not_asked_for_again(web, tmp_path):
    shard = replace(shards_of(web)[0], path="gone.tar")
    with (
        closing(store(web, tmp_path / "cache")) as shards,
        pytest.raises(InputError, match=r"gone\.tar does not exist"),
    ):
        shards.open_shard(shard)
    assert web.asked["/gone.tar"] == 1


def test_the_cache_holds_no_more_than_it_may_and_nothing_is_fetched_twice_while_held(web, tmp_path):
    all_of_them = shards_of(web)
    room = all_of_them[0].bytes + all_of_them[1].bytes
    with closing(store(web, tmp_path / "cache", room)) as shards:
        shards.announce_shards(all_of_them)
        for shard in all_of_them:
            assert len(read(shards, shard)) == shard.samples
            held = [path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")]
            assert sum(held) <= room
    assert all(web.asked[f"/{shard.path}"] == 1 for shard in all_of_them)


def test_what_a_killed_run_fetched_is_used_again_and_what_it_was_fetching_is_removed(web, tmp_path):
    shard = shards_of(web)[0]
    cache = tmp_path / "cache"
    cache.mkdir()
    shutil.copy(tmp_path / "served" / shard.path, cache / f"{shard.sha256}.tar")
    dead = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(dead, 0)
    (cache / f".{'0' * 64}.tar.{dead}").write_bytes(b"half")
    with closing(store(web, cache)) as shards:
        assert len(read(shards, shard)) == shard.samples
        assert len(list(cache.iterdir())) == 1
    assert web.asked[f"/{shard.path}"] == 0


def test_a_url_that_nothing_installed_knows_is_one_sentence():
    with pytest.raises(InputError, match=r"nowhere://bucket/shards\.json cannot be read"):
        ShardManifest.read("nowhere://bucket/shards.json")


class Away(fsspec.AbstractFileSystem):
    """An object store whose library has errors of its own kind, as botocore has."""

    protocol = "away"

    def cat_file(self, path: str, *_: object, **__: object) -> bytes:
        raise RuntimeError(f"Could not connect to the endpoint of {path}")


def test_an_object_store_that_does_not_answer_is_one_sentence():
    fsspec.register_implementation("away", Away, clobber=True)
    with pytest.raises(InputError, match=r"away://b/shards\.json cannot be read .*the endpoint"):
        ShardManifest.read("away://b/shards.json")
