"""A small web on loopback, with pictures and faults."""

from __future__ import annotations

import io
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image, ImageDraw


def picture(number: int, size: tuple[int, int] = (80, 60), kind: str = "JPEG") -> bytes:
    image = Image.new("RGB", size, (number * 37 % 256, number * 91 % 256, number * 53 % 256))
    ImageDraw.Draw(image).ellipse((2, 2, size[0] - 3, size[1] - 3), fill=(255, number % 256, 9))
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=90)
    return buffer.getvalue()


class Web(ThreadingHTTPServer):
    """`/ok/N.jpg`, `/slow/N.jpg` and one path a fault."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.port = self.server_address[1]
        self.hits: Counter[str] = Counter()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}"


class Handler(BaseHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        self.server.hits[self.path] += 1
        kind, _, rest = self.path.strip("/").partition("/")
        try:
            getattr(self, f"answer_{kind}", self.answer_missing)(rest)
        except (BrokenPipeError, ConnectionResetError):
            return

    def answer(
        self, body: bytes, status: int = 200, kind: str = "image/jpeg", **headers: str
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def answer_ok(self, rest: str) -> None:
        self.answer(picture(int(rest.partition(".")[0])))

    def answer_slow(self, rest: str) -> None:
        time.sleep(0.05)
        self.answer_ok(rest)

    def answer_missing(self, rest: str) -> None:
        self.answer(b"<html>no</html>", 404, "text/html")

    def answer_redirect(self, rest: str) -> None:
        self.answer(b"", 302, Location=rest)

    def answer_circle(self, rest: str) -> None:
        self.answer(b"", 302, Location="/circle")

    def answer_html(self, rest: str) -> None:
        self.answer(b"<html>sold</html>", kind="text/html; charset=utf-8")

    def answer_svg(self, rest: str) -> None:
        self.answer(b"<svg/>", kind="image/svg+xml")

    def answer_noai(self, rest: str) -> None:
        self.answer(picture(1), X_Robots_Tag="noai")

    def answer_tiny(self, rest: str) -> None:
        self.answer(picture(1, (8, 8)))

    def answer_garbage(self, rest: str) -> None:
        self.answer(b"\xff\xd8 not a picture")

    def answer_short(self, rest: str) -> None:
        self.answer(picture(1)[:300], Content_Length="4000")

    def answer_huge(self, rest: str) -> None:
        self.answer(b"x" * 300_000)

    def answer_unsized(self, rest: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "image/jpeg")
        self.end_headers()
        self.wfile.write(b"x" * 300_000)

    def answer_drip(self, rest: str) -> None:
        body = picture(1)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for byte in body:
            self.wfile.write(bytes([byte]))
            time.sleep(0.05)

    def answer_headerdrip(self, rest: str) -> None:
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
        for _ in range(200):
            self.wfile.write(b"y")
            time.sleep(0.05)

    def answer_silence(self, rest: str) -> None:
        time.sleep(1.5)

    def answer_flaky(self, rest: str) -> None:
        if self.server.hits[self.path] == 1:
            self.answer(b"", 503)
        else:
            self.answer_ok("3")

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with Web() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()
