"""The demo stage: metadata that points at the loopback server, and held-out evaluation sets (a
classification set over all concepts and a retrieval set, both of Twemoji drawings, in the
webdataset form in which such sets are published), from the concepts in the committed `data/`: their
names, captions and drawings; and a small web on 127.0.0.1 that has these drawings, and the faults
of real hosts: `python -m tasks.demo.demo --port PORT`, or `serve_pictures`. What it answers depends
on the URL alone: a download that is killed and continued meets the same web.
Not here: building that data (`tests/tasks/demo/build_images.py`), which rows point at which fault
(`tests/tasks/demo/plan_metadata.py`).
"""

import argparse
import errno
import io
import json
import logging
import posixpath
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import pyarrow.compute as pc
import pyarrow.parquet as pq

from evaclip_model.config import Config
from evaclip_model.errors import InputError
from tasks.artifacts.artifact import Made
from tasks.demo.config import DemoConfig
from tasks.process.child import start_supervised
from tasks.progress import Report, report_nothing

Artist = Literal["noto", "fluent", "twemoji"]
ARTISTS: tuple[Artist, ...] = ("noto", "fluent", "twemoji")
DATA = Path(__file__).parent / "data"
CONCEPTS_FILE = DATA / "concepts.json"
HOST = "127.0.0.1"
DRIP_S = 30.0
"""Of a `slow` drawing; far beyond any sensible deadline for a thousand bytes."""
DRIP_PAUSE_S = 0.25
"""Pause between its pieces; far below any time-out of a single read."""
START_S = 60.0
"""Until the server listens, on a machine busy with other things."""
GRACE_S = 1.0
READY = "serving the demo's pictures on"
PORT_TAKEN = 98
"""Exit status when another program listens on the port (Linux's EADDRINUSE)."""

PAGE = b"<!doctype html><title>Moved</title><p>This picture has a new home. Please sign in.</p>\n"

log = logging.getLogger(__name__)


class Concept(Config):
    """One thing that all three artists drew."""

    key: str
    """Unicode code points in lower-case hex, joined by '-'; also the drawing's file name."""
    name: str
    """CLDR's English short name; unique, so it is the class name in evaluation."""
    noto: str
    """Caption of the Noto drawing: Unicode name, CLDR name where it differs, keywords."""
    fluent: str
    """Caption of the Fluent drawing: Fluent's own name of it, and keywords."""
    twemoji: tuple[str, ...]
    """Captions of the held-out Twemoji drawing, for retrieval."""
    fluent_phash: str
    """64-bit perceptual hash of the Fluent drawing, 16 hex digits."""


def read_concepts() -> tuple[Concept, ...]:
    """All concepts in Unicode's order."""
    entries = json.loads(CONCEPTS_FILE.read_text(encoding="utf-8"))
    return tuple(Concept.model_validate(entry) for entry in entries)


def artist_zip(artist: Artist) -> Path:
    return DATA / f"{artist}.zip"


def read_drawings(artist: Artist) -> dict[str, bytes]:
    """Concept key -> WebP bytes, 64 x 64 RGB on white."""
    with zipfile.ZipFile(artist_zip(artist)) as archive:
        return {
            name.removesuffix(".webp"): archive.read(name) for name in sorted(archive.namelist())
        }


TEMPLATES = ("{c}", "an emoji of {c}.", "an icon of {c}.", "a drawing of {c}.", "the {c} emoji.")
URL_COLUMNS = {"laion2b": "URL", "coyo700m": "url"}
"""Source -> the column of its addresses, in which the committed files have the default port."""


def write_metadata(source: str, port: int, folder: Path) -> tuple[list[Path], int]:
    """Write the source's files with the server's port in their addresses; (files, rows)."""
    folder.mkdir(parents=True, exist_ok=True)
    files, rows, name = [], 0, URL_COLUMNS[source]
    for committed in sorted((DATA / "metadata" / source).glob("*.parquet")):
        table = pq.read_table(committed)
        urls = pc.replace_substring(table[name], f":{DemoConfig().port}/", f":{port}/")
        table = table.set_column(table.column_names.index(name), table.field(name), urls)
        files.append(folder / committed.name.replace("zstd", "snappy"))
        pq.write_table(table, files[-1], compression="snappy")
        rows += len(table)
    return files, rows


def write_eval_sets(concepts: Sequence[Concept], folder: Path) -> list[Path]:
    """Write both sets below `folder`; the order of concepts gives labels and file numbers."""
    drawings = read_drawings("twemoji")
    images = [drawings[concept.key] for concept in concepts]
    names = [concept.name for concept in concepts]
    labels = [("cls", str(label)) for label in range(len(concepts))]
    captions = [("txt", "\n".join(concept.twemoji)) for concept in concepts]
    first, second = folder / "emoji-twemoji", folder / "emoji-twemoji-retrieval"
    return [
        _write_lines(first / "classnames.txt", *names),
        _write_lines(first / "zeroshot_classification_templates.txt", *TEMPLATES),
        *_write_shard(first, images, labels),
        _write_lines(second / "dataset_type.txt", "retrieval"),
        *_write_shard(second, images, captions),
    ]


def _write_shard(
    folder: Path, images: Sequence[bytes], answers: Sequence[tuple[str, str]]
) -> list[Path]:
    path = folder / "test" / "0.tar"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (image, (extension, answer)) in enumerate(zip(images, answers, strict=True)):
            for kind, data in (("webp", image), (extension, answer.encode())):
                # its time and owner are zero: the same bytes every time
                member = tarfile.TarInfo(f"s{number:07d}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return [path, _write_lines(folder / "test" / "nshards.txt", "1")]


def _write_lines(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def make_demo(config: DemoConfig, out: Path, report: Report = report_nothing) -> Made:
    """Write `metadata/SOURCE/*.parquet` and `eval/SET/...` into `out`."""
    concepts = read_concepts()
    files: list[Path] = []
    counts = {"concepts": len(concepts)}
    for source in URL_COLUMNS:
        place = out / "metadata" / source
        written, counts[f"{source}.rows"] = write_metadata(source, config.port, place)
        files += written
    files += write_eval_sets(concepts, out / "eval")
    report(1, 1)
    return Made(counts=counts, files=tuple(files))


class Web(ThreadingHTTPServer):
    """The server; `drawings` maps `ARTIST/KEY.webp` to the file's bytes."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256  # downloaders open dozens of connections at once

    def __init__(self, port: int, drawings: Mapping[str, bytes], drip_s: float = DRIP_S) -> None:
        self.drawings = drawings
        self.drip_s = drip_s
        super().__init__((HOST, port), Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that give up are what the faults are for; anything else is shown."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class Handler(BaseHTTPRequestHandler):
    """Answers one request by the first part of its path, its route.

    img: the drawing. moved: redirect to it. gone: 404. busy: 503. page: an HTML page instead.
    broken: half a file, complete as HTTP. cut: the connection ends half-way. slow: one byte at a
    time. loop: redirects to itself. optout: the drawing, with a header that forbids training.
    """

    protocol_version = "HTTP/1.1"
    server: Web

    def do_GET(self) -> None:
        route, name = split_path(self.path)
        drawing = self.server.drawings.get(name, b"")
        half = drawing[: len(drawing) // 2]
        answers: dict[str, dict[str, Any]] = {
            "img": {"body": drawing},
            "optout": {"body": drawing, "X_Robots_Tag": "noai, noimageai"},
            "moved": {"status": HTTPStatus.MOVED_PERMANENTLY, "Location": f"/img/{name}"},
            "loop": {"status": HTTPStatus.FOUND, "Location": f"/loop/{name}"},
            "busy": {"status": HTTPStatus.SERVICE_UNAVAILABLE, "Retry_After": "120"},
            "page": {"body": PAGE, "Content_Type": "text/html"},
            "broken": {"body": half},
            "cut": {"body": drawing, "sent": [half], "Connection": "close"},
            "slow": {"body": drawing, "sent": self._drip(drawing), "Connection": "close"},
            "gone": {"status": HTTPStatus.NOT_FOUND},
        }
        self._answer(**answers[route if drawing and route in answers else "gone"])

    def log_message(self, format: str, *args: object) -> None:
        log.debug(format, *args)

    def _answer(
        self,
        body: bytes = b"",
        status: HTTPStatus = HTTPStatus.OK,
        sent: Iterable[bytes] | None = None,
        **headers: str,
    ) -> None:
        """Promise `body`, and send it or the pieces `sent`."""
        self.send_response(status)
        about = {"Content-Type": "image/webp"} if body else {}
        about |= {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in {**about, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        for piece in [body] if sent is None else sent:
            self.wfile.write(piece)

    def _drip(self, body: bytes) -> Iterator[bytes]:
        size = -(-len(body) // max(1, round(self.server.drip_s / DRIP_PAUSE_S)))
        for start in range(0, len(body), size):
            yield body[start : start + size]
            time.sleep(DRIP_PAUSE_S)


def split_path(target: str) -> tuple[str, str]:
    """Request target -> (route, `ARTIST/FILE`), whatever its spelling, query or dot segments."""
    path = posixpath.normpath(unquote(urlsplit(target).path))
    route, _, name = path.lstrip("/").partition("/")
    return route, name


def read_web() -> dict[str, bytes]:
    """`ARTIST/KEY.webp` -> bytes of every committed drawing."""
    return {
        f"{artist}/{key}.webp": drawing
        for artist in ARTISTS
        for key, drawing in read_drawings(artist).items()
    }


@contextmanager
def serve_pictures(config: DemoConfig) -> Iterator[None]:
    """Serve the demo's pictures for the length of the block, from a process that ends with it and
    with the caller, even if that is killed. InputError: another program listens on the port."""
    command = [sys.executable, "-m", "tasks.demo.demo", "--port", str(config.port)]
    with tempfile.TemporaryDirectory(prefix="demo-web-") as folder:
        output = Path(folder) / "log"
        with start_supervised(command, log=output, grace_s=GRACE_S) as process:
            deadline = time.monotonic() + START_S
            while READY not in (said := output.read_text(errors="replace")):
                if process.poll() == PORT_TAKEN:
                    raise InputError(said.strip())
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the demo's server did not start: {said}")
                time.sleep(0.05)
            yield


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tasks.demo.demo", description=__doc__)
    parser.add_argument("--port", type=int, default=DemoConfig().port, help="TCP port")
    port: int = parser.parse_args().port
    try:
        web = Web(port, read_web())
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        sys.stderr.write(
            f"port {port} is in use: stop the program that listens there, or choose another port "
            "with --set demo.port=NUMBER\n"
        )
        return PORT_TAKEN
    sys.stdout.write(f"{READY} http://{HOST}:{port}\n")
    sys.stdout.flush()
    with web, suppress(KeyboardInterrupt):
        web.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
