"""What strangers' bytes may do, one function a boundary: `data` in, nothing out, an exception when
a promise is broken. Errors that a boundary is meant to raise are none.

Run by fuzz.py, coverage-guided, and over the committed corpus by test_corpus.py.
"""

from __future__ import annotations

import socket
import ssl
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from email.message import Message
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from evaclip_model.errors import InputError
from evaclip_model.reading import image_decoder
from evaclip_model.reading.samples import BrokenShard, read_samples
from evaclip_model.weights.checkpoint_files import open_tensors
from evaclip_model.zeroshot import embed_files
from flows.config.recipe import load_recipe
from tasks.download import fetch
from tasks.download.config import DownloadConfig
from tasks.download.fetch_outcome import Outcome, outcome_of
from tasks.download.politeness import declines_use, parse_rules
from tasks.merge.config import FilterConfig
from tasks.merge.database import load_statement, open_database
from tasks.merge.filters import reason_expression, rule_parameters
from tasks.tables.text_tables import read_text_table
from tasks.web_addresses import normalise_host, normalise_web_address, read_host_entry
from tests.tasks.merge import reference

SMALL = 1_000_000
"""Pixels an image may have here."""
FIELD = b"\xff"
"""Parts the fields of an input that has several; no UTF-8 holds it."""


@contextmanager
def file_of(data: bytes, name: str) -> Iterator[Path]:
    """A file with these bytes, in memory where the machine has a place for that."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        yield path


def fuzz_image(data: bytes) -> None:
    """An image decodes or is refused, whichever door it takes."""
    for decode in (image_decoder.decode_image, image_decoder.decode_undamaged_image):
        with suppress(image_decoder.UnreadableImageError):
            decode(data, SMALL)
    image_decoder.read_jpeg_orientation(data)


def fuzz_tar(data: bytes) -> None:
    """A tar gives samples or is broken. Sums of headers are mended, so that mutations get past."""
    blocks = bytearray(data)
    for at in range(0, len(blocks) - 511, 512):
        if blocks[at + 257 : at + 262] == b"ustar":
            blocks[at + 148 : at + 156] = b" " * 8
            blocks[at + 148 : at + 156] = b"%06o\0 " % sum(blocks[at : at + 512])
    with file_of(bytes(blocks), "0.tar") as path, suppress(BrokenShard, InputError):
        for _ in read_samples(path):
            pass


@cache
def _merge_query() -> tuple[Any, str, FilterConfig]:
    """(a database, the statement that judges a row, the filters)."""
    filters = FilterConfig(min_similarity=0.2, min_side=8, max_aspect=3, languages=("en",))
    columns = """$url::VARCHAR AS raw_url, $caption::VARCHAR AS raw_caption, NULL AS image_hash,
        8::BIGINT AS width, NULL::BIGINT AS height, 0.3::DOUBLE AS similarity,
        NULL::DOUBLE AS watermark, 0.1::DOUBLE AS unsafe_score, false AS lacks_score,
        false AS unsafe_tag, false AS unknown_tag, 'en' AS language, true AS has_language,
        true AS has_similarity, false AS has_watermark, false AS broken_text"""
    query = (
        f"WITH published AS (SELECT {columns}), {load_statement('normalise')} "
        f"SELECT url, address, caption, {reason_expression(filters)} AS reason FROM normalised"
    )
    context = open_database(Path(tempfile.mkdtemp()), "500MB", 1)
    _merge_query.__dict__["open"] = context  # as long as the process
    return context.__enter__(), query, filters


def fuzz_merge(data: bytes) -> None:
    """A row is judged and normalised as the plain-Python reference does."""
    connection, query, filters = _merge_query()
    url, caption = (part.decode("utf-8", "ignore") for part in (*data.split(FIELD), b"", b"")[:2])
    parameters = rule_parameters(filters) | {"url": url, "caption": caption}
    named = {name: value for name, value in parameters.items() if f"${name}" in query}
    [found] = connection.execute(query, named).fetchall()
    sides = {"width": 8, "height": None, "similarity": 0.3, "watermark": None, "language": "en"}
    row = {"url": url, "caption": caption, "unsafe_scores": [0.1], "unsafe_tags": [], **sides}
    has = {"language", "similarity"}
    expected = reference.reason(row, filters, has, reference.NOTHING_BLOCKED)
    assert found[3] == expected, (found, expected)
    if expected is None:
        address, whole = reference.address_and_url(url)  # type: ignore[misc]
        assert found[:3] == (whole, address, reference.tidy(caption)), (found, whole)


def fuzz_recipe(data: bytes) -> None:
    """A recipe loads or is refused in one sentence."""
    with file_of(data, "r.toml") as path, suppress(InputError):
        load_recipe(str(path))


def fuzz_checkpoint(data: bytes) -> None:
    """A file of weights gives tensors or is refused in one sentence."""
    name = "m.safetensors" if data[:1] != b"P" else "m.pt"
    with file_of(data, name) as path, suppress(InputError):
        for tensor in open_tensors(path, shapes={}).values():
            if tensor.shape.numel() < SMALL:
                tensor.read()


def fuzz_policies(data: bytes) -> None:
    """robots.txt and headers never raise; normal forms are their own normal form."""
    text, path, header = (
        part.decode("latin-1") for part in (*data.split(FIELD), b"", b"", b"")[:3]
    )
    parse_rules(data, "evaclip").allow(f"http://a.example/{path}")
    headers = Message()
    for name in ("X-Robots-Tag", "tdm-reservation", "Content-Usage"):
        headers.add_header(name, header.replace("\r", "").replace("\n", ""))
    declines_use(headers, token="evaclip", directives=("noai",), tdm=True)
    for line in text.splitlines():
        assert not line or all(read_host_entry(line) or ["-"])
        host = normalise_host(line)
        assert host is None or normalise_host(host) == host, (line, host)
        with suppress(ValueError):
            normal = normalise_web_address(line)
            assert normalise_web_address(normal) == normal, (line, normal)


def fuzz_table(data: bytes) -> None:
    """A line of a text table is a row or has a flaw; the file itself may be refused."""
    for name, kind in (("t.csv", "csv"), ("t.tsv", "csv"), ("t.jsonl", "jsonl")):
        with file_of(data, name) as path, suppress(InputError):
            for row in read_text_table(str(path), kind):  # type: ignore[arg-type]
                assert row.line > 0
                for value in row.values.values():
                    assert value is None or value.encode() is not None
    for name in ("t.csv", "t.tsv", "t.txt", "t.parquet"):
        with file_of(data, name) as path, suppress(InputError):
            for part in embed_files._list_parts(path):
                assert len(list(part.rows)) == part.size


class _Answers:
    """Connections whose other end has said one answer each, and then nothing."""

    def __init__(self, data: bytes) -> None:
        self.left = data.split(FIELD)
        self.taken = 0

    def connect_next(self, *_: object) -> socket.socket:
        if not self.left:
            raise ConnectionRefusedError(111, "nobody listens")
        self.taken += 1
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.sendall(self.left.pop(0)[:60_000])
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 1))
        return ours


TLS = ssl.create_default_context()
POLITE = {"respect_robots": True, "respect_ai_txt": True, "rest_after": 10_000}
REDIRECTS = DownloadConfig(
    **{"retries": 0, "deadline_s": 2, "timeout_s": 1, "max_bytes": 100_000, "politeness": POLITE}
)


def fuzz_redirects(data: bytes) -> None:
    """Whatever hosts answer, a URL ends in bytes or a reason, after a bounded number of hops."""
    answers = _Answers(data)
    with (
        patch.object(fetch, "_connect_allowed", answers.connect_next),
        patch.object(fetch.ssl, "create_default_context", lambda: TLS),  # which takes 0.1 s
    ):
        body, message = fetch.Fetcher(REDIRECTS).fetch_image("http://a.example/1.jpg")
    assert (body is None) == (message is not None)
    assert body is None or len(body) <= REDIRECTS.max_bytes
    hops = fetch.MAX_REDIRECTS + 1
    assert answers.taken <= hops * (1 + 2 * (fetch.MAX_RULES_REDIRECTS + 1))
    assert outcome_of("failed", message) in Outcome


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    "image": fuzz_image,
    "tar": fuzz_tar,
    "merge": fuzz_merge,
    "recipe": fuzz_recipe,
    "checkpoint": fuzz_checkpoint,
    "policies": fuzz_policies,
    "table": fuzz_table,
    "redirects": fuzz_redirects,
}
