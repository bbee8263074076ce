"""A small web on 127.0.0.1: the committed drawings, and the faults that real hosts have.

`python -m tasks.demo.demo_web --port PORT`, or `serve_pictures`. What is answered depends on the
URL alone: a download that is killed and continued meets the same web.
Not here: which rows point at which fault (`tests/tasks/demo/plan_metadata.py`).
"""

import argparse
import errno
import logging
import posixpath
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from evaclip_model.errors import InputError
from tasks.demo.config import DemoConfig
from tasks.demo.world import ARTISTS, read_drawings
from tasks.process.child import start_supervised

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
    command = [sys.executable, "-m", "tasks.demo.demo_web", "--port", str(config.port)]
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
    parser = argparse.ArgumentParser(prog="python -m tasks.demo.demo_web", description=__doc__)
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
