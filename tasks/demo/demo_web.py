"""A small web on 127.0.0.1: the committed drawings, and the faults that real hosts have.

Covers: the server (`python -m tasks.demo.demo_web --port PORT`), and `serve_pictures`, which
runs it beside the caller in a process that cannot outlive it.
Not here: which rows point at which fault (`metadata.py`).

What is answered depends on the URL alone, never on earlier requests: a download that is killed and
continued meets the same web.
"""

from __future__ import annotations

import argparse
import errno
import logging
import posixpath
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from evaclip_model.errors import InputError
from tasks.demo.concepts import ARTISTS, read_drawings
from tasks.demo.config import DemoConfig
from tasks.process.child import start_supervised

HOST = "127.0.0.1"
DRIP_S = 30.0
"""How long a `slow` drawing takes; far beyond any sensible deadline for a thousand bytes."""
DRIP_PAUSE_S = 0.25
"""Pause between its pieces; far below any time-out of a single read."""
START_S = 60.0
"""How long the server may take to listen, on a machine busy with other things."""
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
    """Answers one request by the first part of its path; see `metadata.Route`."""

    protocol_version = "HTTP/1.1"
    server: Web

    def do_GET(self) -> None:
        route, name = split_path(self.path)
        drawing = self.server.drawings.get(name)
        if drawing is None or route == "gone":
            self._send_status(HTTPStatus.NOT_FOUND)
        elif route == "img":
            self._send_body(drawing)
        elif route == "optout":
            self._send_body(drawing, headers={"X-Robots-Tag": "noai, noimageai"})
        elif route == "moved":
            self._send_status(HTTPStatus.MOVED_PERMANENTLY, {"Location": f"/img/{name}"})
        elif route == "loop":
            self._send_status(HTTPStatus.FOUND, {"Location": f"/loop/{name}"})
        elif route == "busy":
            self._send_status(HTTPStatus.SERVICE_UNAVAILABLE, {"Retry-After": "120"})
        elif route == "page":
            self._send_body(PAGE, content_type="text/html")
        elif route == "broken":
            self._send_body(drawing[: len(drawing) // 2])
        elif route == "cut":
            self._send_half(drawing)
        elif route == "slow":
            self._send_slowly(drawing)
        else:
            self._send_status(HTTPStatus.NOT_FOUND)

    def log_message(self, format: str, *args: object) -> None:
        log.debug(format, *args)

    def _send_head(self, length: int, content_type: str, headers: Mapping[str, str]) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send_body(
        self,
        body: bytes,
        content_type: str = "image/webp",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._send_head(len(body), content_type, headers or {})
        self.wfile.write(body)

    def _send_half(self, body: bytes) -> None:
        self.close_connection = True
        self._send_head(len(body), "image/webp", {"Connection": "close"})
        self.wfile.write(body[: len(body) // 2])

    def _send_slowly(self, body: bytes) -> None:
        self.close_connection = True
        self._send_head(len(body), "image/webp", {"Connection": "close"})
        pieces = max(1, round(self.server.drip_s / DRIP_PAUSE_S))
        size = -(-len(body) // pieces)
        for start in range(0, len(body), size):
            self.wfile.write(body[start : start + size])
            time.sleep(DRIP_PAUSE_S)

    def _send_status(self, status: HTTPStatus, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()


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
    """Serve the demo's pictures for the length of the block, from a process of its own.

    The server ends with the block, or with the caller, even if that is killed.

    Raises:
        InputError: another program listens on the port.
    """
    _refuse_taken_port(config.port)
    command = [sys.executable, "-m", "tasks.demo.demo_web", "--port", str(config.port)]
    with tempfile.TemporaryDirectory(prefix="demo-web-") as folder:
        output = Path(folder) / "log"
        with start_supervised(command, log=output, grace_s=GRACE_S) as process:
            deadline = time.monotonic() + START_S
            while READY not in output.read_text(errors="replace"):
                if process.poll() == PORT_TAKEN:
                    raise _port_taken(config.port)
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the demo's server did not start: {output.read_text()}")
                time.sleep(0.05)
            yield


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tasks.demo.demo_web", description=__doc__)
    parser.add_argument("--port", type=int, default=DemoConfig().port, help="TCP port")
    port: int = parser.parse_args(arguments).port
    try:
        web = Web(port, read_web())
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        sys.stderr.write(f"{_port_taken(port)}\n")
        return PORT_TAKEN
    sys.stdout.write(f"{READY} http://{HOST}:{port}\n")
    sys.stdout.flush()
    with web:
        try:
            web.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


def _refuse_taken_port(port: int) -> None:
    """Say so at once, instead of after the server has started and failed."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise _port_taken(port) from None
            raise


def _port_taken(port: int) -> InputError:
    return InputError(
        f"port {port} is in use: stop the program that listens there, or choose another port "
        "with --set demo.port=NUMBER"
    )


if __name__ == "__main__":
    sys.exit(main())
