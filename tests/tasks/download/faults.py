"""Every fault of the web as rows of a download, and how each must end.

Four hosts on loopback, one port: 127.0.0.1 has pictures and faults, 127.0.0.2 stands for a private
host that nobody may reach, 127.0.0.3 refuses for its first seconds, 127.0.0.4 for ever.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.download.config import DownloadConfig
from tasks.download.fetch_outcome import Outcome, outcome_of
from tests.tasks.download.web import Web, picture, serving

GOOD, PRIVATE, TIRED, BUSY = "127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4"
CONFIG = DownloadConfig(
    image_px=64,
    min_image_px=16,
    max_aspect_ratio=3,
    timeout_s=1.5,
    deadline_s=3.0,
    max_bytes=200_000,
    retries=1,
    politeness={"retry_wait_s": 0.05, "pass_wait_s": 3.0},
    hash_column="expected_md5",
    allowed_networks=tuple(f"{host}/32" for host in (GOOD, TIRED, BUSY)),
    min_success_rate=0.2,
)
SLOW = ("drip", "headerdrip", "silence")


@dataclass(frozen=True)
class Row:
    """One row of the list."""

    kind: str
    url: str
    expected: Outcome
    md5: str | None = None


def faults(port: int, number: int) -> Iterator[Row]:
    """One row of each fault; `number` makes their URLs differ."""
    there = f"http://{GOOD}:{port}"
    for path, expected in {
        "missing": Outcome.NOT_FOUND,
        "forbidden": Outcome.FORBIDDEN,
        "broken": Outcome.SERVER_ERROR,
        "drip": Outcome.DEADLINE,
        "headerdrip": Outcome.DEADLINE,
        "silence": Outcome.TIMEOUT,
        "circle": Outcome.REDIRECT_LOOP,
        "redirect/file:///etc/hostname": Outcome.REDIRECT_LOOP,
        "redirect/ftp://127.0.0.1/x.jpg": Outcome.BAD_URL,
        f"redirect/http://{PRIVATE}:{port}/ok/1.jpg": Outcome.ADDRESS_REFUSED,
        f"redirect/{there}/ok/2.jpg": Outcome.SUCCESS,
        "bomb": Outcome.TOO_MANY_PIXELS,
        "huge": Outcome.TOO_MANY_BYTES,
        "unsized": Outcome.TOO_MANY_BYTES,
        "html": Outcome.NOT_AN_IMAGE_TYPE,
        "svg": Outcome.NOT_AN_IMAGE_TYPE,
        "garbage": Outcome.UNDECODABLE,
        "cut": Outcome.UNDECODABLE,
        "gzip": Outcome.UNDECODABLE,
        "short": Outcome.INCOMPLETE,
        "tiny": Outcome.TOO_SMALL,
        "long": Outcome.ASPECT_RATIO,
        "noai": Outcome.OPTED_OUT,
        "noml": Outcome.OPTED_OUT,
        "tdm": Outcome.OPTED_OUT,
        "flaky": Outcome.SUCCESS,
        "busy/1/1": Outcome.SUCCESS,
    }.items():
        kind = path.partition("/")[0]
        tail = "" if kind == "redirect" else f"/{number}"
        yield Row(kind, f"{there}/{path}{tail}?{number}", expected)
    yield Row("private", f"http://{PRIVATE}:{port}/ok/{number}.jpg", Outcome.ADDRESS_REFUSED)
    yield Row("tired", f"http://{TIRED}:{port}/tired/{number}.jpg", Outcome.SUCCESS)
    yield Row("busy for ever", f"http://{BUSY}:{port}/busy/9/999999/{number}", Outcome.RATE_LIMITED)
    yield Row("no web", f"http://{GOOD}:1/{number}.jpg", Outcome.CONNECTION)
    yield Row("no TLS", f"https://{GOOD}:{port}/ok/{number}.jpg", Outcome.TLS)
    yield Row("file", f"file:///etc/hostname?{number}", Outcome.BAD_URL)
    yield Row("credentials", f"http://me:secret@{GOOD}:{port}/ok/{number}.jpg", Outcome.BAD_URL)
    yield Row("bad host", f"http://{'a' * 70}.example/{number}.jpg", Outcome.BAD_URL)
    good = hashlib.md5(picture(number)).hexdigest()
    yield Row("right hash", f"{there}/ok/{number}.jpg?hash", Outcome.SUCCESS, good)
    yield Row("wrong hash", f"{there}/ok/{number}.jpg?wrong", Outcome.HASH_MISMATCH, "0" * 32)
    for _ in range(2):
        yield Row("duplicate", f"{there}/ok/{number}.jpg?twice", Outcome.SUCCESS)


def rows_of(port: int, total: int, of_each: int, of_each_slow: int) -> list[Row]:
    """`total` rows: so many of each fault, the rest pictures; in mixed order, always the same."""
    rows = [
        row
        for number in range(of_each)
        for row in faults(port, number)
        if row.kind not in SLOW or number < of_each_slow
    ]
    pictures = total - len(rows)
    assert pictures > 0, f"{len(rows)} faults do not fit into {total} rows"
    url = f"http://{GOOD}:{port}/slow"
    rows += [Row("picture", f"{url}/{n}.jpg", Outcome.SUCCESS) for n in range(pictures)]
    mixed = [(hashlib.md5(f"{n} {row.kind}".encode()).digest(), row) for n, row in enumerate(rows)]
    return [row for _, row in sorted(mixed, key=lambda pair: pair[0])]


def write_rows(folder: Path, rows: list[Row]) -> dict[str, Row]:
    """Write them as a finished merge would, in two sources; return them by uid."""
    by_uid: dict[str, Row] = {}
    fourth, others = rows[::4], [row for number, row in enumerate(rows) if number % 4]
    for source, part in (("coyo700m", fourth), ("laion2b", others)):
        uids = [hashlib.md5(f"{source} {n}".encode()).hexdigest() for n in range(len(part))]
        by_uid.update(zip(uids, part, strict=True))
        table = pa.table(
            {
                "uid": uids,
                "source": [source] * len(part),
                "url": [row.url for row in part],
                "caption": [f"{row.kind} {n}" for n, row in enumerate(part)],
                "expected_md5": pa.array([row.md5 for row in part], pa.string()),
            }
        )
        (folder / source).mkdir(parents=True)
        pq.write_table(table, folder / source / "part-00000.parquet")
    return by_uid


def outcomes_of(out: Path) -> dict[str, Outcome]:
    """How every uid ended, by the tables of all passes; a uid that two samples have is an error."""
    ended: dict[str, Outcome] = {}
    first, later = out.glob("shards/*.parquet"), out.glob("pass-*/shards/*.parquet")
    for path in (*sorted(first), *sorted(later)):
        table = pq.read_table(path, columns=["uid", "status", "error_message"])
        for row in table.to_pylist():
            assert ended.get(row["uid"]) is not Outcome.SUCCESS, f"{row['uid']} is there twice"
            ended[row["uid"]] = outcome_of(row["status"], row["error_message"])
    return ended


@contextmanager
def four_hosts(port: int = 0) -> Iterator[dict[str, Web]]:
    """The hosts by address, on one port."""
    with ExitStack() as stack:
        webs = {GOOD: stack.enter_context(serving(port, GOOD))}
        for host in (PRIVATE, TIRED, BUSY):
            webs[host] = stack.enter_context(serving(webs[GOOD].port, host))
        yield webs
