"""Files of a Hugging Face dataset, `hf://datasets/…`, from a server on loopback that speaks as much
of the hub's HTTP API as huggingface_hub asks for."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaclip_model.errors import InputError
from evaclip_model.reading import open_webdataset
from evaclip_model.reading.config import SamplingConfig
from evaclip_model.reading.reader import BatchReader, ReadSettings
from tasks.adopt.adopt import inspect_source
from tasks.artifacts.artifact import Address, produce_artifact
from tasks.dataset.config import DatasetConfig
from tasks.dataset.dataset import OutsideFiles, Takedowns, make_dataset
from tasks.index.adopted_shards import read_adopted
from tasks.progress import report_nothing
from tasks.verify.config import STAGE, VerifyConfig
from tasks.verify.verify import verify_shards
from tests.tasks.adopt.test_adopt import adopted, pack, picture, stranger

REPOSITORY = "somebody/pictures"
SHA = "c0ffee" * 6 + "c0ff"
URL = f"hf://datasets/{REPOSITORY}"
PLACES = re.compile(
    rf"/(?:api/datasets/{REPOSITORY}(?:/(?P<what>revision|tree|paths-info)/(?P<at>[^/]+))?"
    rf"|datasets/{REPOSITORY}/resolve/(?P<resolved>[^/]+))(?:/(?P<path>.*))?"
)


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers for the files below `folder`, as one dataset of one commit."""

    folder: Path
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        is_json = "json" in self.headers.get("Content-Type", "")
        asked = json.loads(body)["paths"] if is_json else parse_qs(body).get("paths", [])
        names = [asked] if isinstance(asked, str) else asked
        paths = [self.folder / name for name in names]
        self.answer(json.dumps([self.describe(path) for path in paths if path.exists()]).encode())

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        asked = PLACES.fullmatch(unquote(address.path))
        if asked is None:
            self.answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
            return
        path = self.folder / (asked["path"] or "")
        if asked["resolved"]:
            self.send_file(path)
        elif asked["what"] == "tree":
            recursive = parse_qs(address.query).get("recursive", ["false"])[0].lower() == "true"
            found = sorted(path.rglob("*") if recursive else path.glob("*"))
            self.answer(json.dumps([self.describe(one) for one in found]).encode())
        else:
            about = {"id": REPOSITORY, "sha": SHA, "private": False, "tags": [], "siblings": []}
            self.answer(json.dumps(about).encode())

    def describe(self, path: Path) -> dict[str, object]:
        """An entry of the hub's listings."""
        name = path.relative_to(self.folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
        oid = hashlib.sha1(path.read_bytes()).hexdigest()
        return {"type": "file", "path": name, "oid": oid, "size": path.stat().st_size}

    def send_file(self, path: Path) -> None:
        if not path.is_file():
            self.answer(b"", 404, {"X-Error-Code": "EntryNotFound"})
            return
        content = path.read_bytes()
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {"ETag": f'"{self.describe(path)["oid"]}"', "X-Repo-Commit": SHA}
        if part is None:
            self.answer(content, 200, headers)
            return
        start, size = int(part[1]), len(content)
        stop = min(int(part[2]) + 1 if part[2] else size, size)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self.answer(content[start:stop], 206, headers)

    def answer(
        self, content: bytes, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder of the dataset that `URL` names."""
    from huggingface_hub import HfFileSystem, constants

    folder = tmp_path / "hub"
    folder.mkdir()
    handler = type("FolderHub", (Hub,), {"folder": folder})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)  # for the processes that verify
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    HfFileSystem.clear_instance_cache()
    yield folder
    HfFileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()


def test_shards_of_the_hub_are_inspected_adopted_verified_and_read(
    hub: Path, tmp_path: Path
) -> None:
    pack(hub / "data/00000.tar", [stranger(n) for n in range(6)])
    pack(hub / "data/00001.tar", [stranger(n, txt=None if n == 8 else f"x {n}") for n in (7, 8, 9)])
    inspection = inspect_source(f"{URL}/data/*.tar")
    assert inspection is not None
    assert (inspection.form, inspection.files, inspection.left.pairs) == ("shards", 2, 6)
    made = adopted(tmp_path / "runs/adopt", f"{URL}/data")
    assert made.counts["shards"] == 2
    assert not made.bulk, "nothing was packed"
    names = [one.location for one in read_adopted(tmp_path / "runs/adopt")]
    assert names == [f"{URL}/data/00000.tar", f"{URL}/data/00001.tar"]
    address = Address.of(tmp_path / "runs", STAGE, VerifyConfig(), {"adopt": "0" * 16})
    verified = produce_artifact(
        address,
        lambda out: verify_shards(VerifyConfig(), tmp_path / "runs/adopt", out, 1, report_nothing),
    )
    assert (verified.counts["samples"], verified.counts["bad.no_caption"]) == (8, 1)
    version = tmp_path / "runs/dataset/x"
    version.mkdir(parents=True)
    rules, nothing = DatasetConfig(exact_duplicates="keep"), (OutsideFiles(), Takedowns())
    make_dataset(rules, [verified], *nothing, version, report_nothing)
    expected = sorted([*(f"noise {n}" for n in range(6)), "x 7", "x 9"])
    sampling = SamplingConfig(image_px=16, global_batch=8, lanes=4, shuffle_buffer=4)
    settings = ReadSettings(shard_cache=tmp_path / "cache", shard_cache_bytes=1 << 30)
    reader = BatchReader(version / "shards.json", sampling, rank=0, ranks=1, settings=settings)
    with closing(reader):
        assert sorted(reader.read_batch(0).captions) == expected
    opened = open_webdataset(version / "shards.json")
    assert sorted(sample["txt"].decode() for sample in opened) == expected


def test_parquet_of_the_hub_with_a_column_of_images_is_packed(hub: Path, tmp_path: Path) -> None:
    images = [{"bytes": picture(number), "path": f"{number}.jpg"} for number in range(5)]
    rows = pa.table({"image": [*images, None], "text": [f"noise {n}" for n in range(6)]})
    (hub / "data").mkdir()
    pq.write_table(rows, hub / "data/train-00000-of-00001.parquet")
    inspection = inspect_source(f"{URL}/data/*.parquet")
    assert inspection is not None
    assert (inspection.form, inspection.left.pairs) == ("parquet", 5)
    assert dict(inspection.left.reasons) == {"no_image": 1}
    made = adopted(tmp_path / "adopt", f"{URL}/data/train-*.parquet")
    assert (made.counts["packed"], made.counts["left_out.no_image"]) == (1, 1)
    counts = verify_shards(
        VerifyConfig(), tmp_path / "adopt", tmp_path / "verify", 1, report_nothing
    ).counts
    assert counts["samples"] == 5


def test_a_dataset_that_the_hub_lacks_is_one_sentence(hub: Path) -> None:
    with pytest.raises(InputError, match=r"hf://datasets/nobody/nothing"):
        inspect_source("hf://datasets/nobody/nothing/*.tar")
    with pytest.raises(InputError, match=r"no file matches 'hf://.*/none-\*\.tar'"):
        inspect_source(f"{URL}/none-*.tar")
