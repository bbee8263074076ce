"""A small web on loopback: pictures, and every fault of the real one under a path of its own."""

from __future__ import annotations

import gzip
import io
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image, ImageDraw


def picture(number: int, size: tuple[int, int] = (80, 60), kind: str = "JPEG") -> bytes:
    image = Image.new("RGB", size, (number * 37 % 256, number * 91 % 256, number * 53 % 256))
    ImageDraw.Draw(image).ellipse((2, 2, size[0] - 3, size[1] - 3), fill=(255, number % 256, 9))
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=90)
    return buffer.getvalue()


def bomb(side: int = 20_000) -> bytes:
    """A PNG of side x side black pixels, a few tens of kB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    packer = zlib.compressobj(9)
    rows = (packer.compress(bytes(1 + side // 8)) for _ in range(side))
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    body = b"".join(rows) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


BOMB = bomb()


class Web(ThreadingHTTPServer):
    """`/ok/N.jpg`, `/slow/N.jpg` and one path a fault."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, port: int = 0, host: str = "127.0.0.1") -> None:
        super().__init__((host, port), Handler)
        self.port = self.server_address[1]
        self.hits: Counter[str] = Counter()
        self.agents: set[str] = set()
        self.tired_until = float("inf")
        self.crowd = self.crowd_at_most = 0
        self.lock = threading.Lock()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that give up are what the faults are for."""


class Handler(BaseHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        self.server.hits[self.path] += 1
        self.server.agents.add(self.headers.get("User-Agent", ""))
        kind, _, rest = (
            self.path.partition("?")[0].strip("/").replace("robots.txt", "robots").partition("/")
        )
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

    def answer_crowd(self, rest: str) -> None:
        with self.server.lock:
            self.server.crowd += 1
            self.server.crowd_at_most = max(self.server.crowd, self.server.crowd_at_most)
        time.sleep(0.1)
        with self.server.lock:
            self.server.crowd -= 1
        self.answer_ok(rest)

    def answer_robots(self, rest: str) -> None:
        self.answer(b"User-agent: evaclip\nDisallow: /private/\n", kind="text/plain")

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

    def answer_noml(self, rest: str) -> None:
        self.answer(picture(1), X_Robots_Tag="otherbot: noindex", x_robots_tag="evaclip: noml")

    def answer_tdm(self, rest: str) -> None:
        self.answer(picture(1), tdm_reservation="1")

    def answer_busy(self, rest: str) -> None:
        """`busy/SECONDS/N`: refused N times, then there."""
        seconds, times = rest.split("/")[:2]
        if self.server.hits[self.path] <= int(times):
            self.answer(b"", 429, Retry_After=seconds)
        else:
            self.answer_ok("4")

    def answer_jester(self, rest: str) -> None:
        """A reason that looks like the end of one of our messages, and is 60 kB long."""
        self.wfile.write(f"HTTP/1.0 429 (retry after 1.2.3 s) {'x' * 60_000}\r\n\r\n".encode())

    def answer_tired(self, rest: str) -> None:
        """Refused for two seconds after the first request, then there."""
        with self.server.lock:
            if self.server.tired_until == float("inf"):
                self.server.tired_until = time.monotonic() + 2.0
        if time.monotonic() < self.server.tired_until:
            self.answer(b"", 429, Retry_After="2")
        else:
            self.answer_ok(rest)

    def answer_forbidden(self, rest: str) -> None:
        self.answer(b"", 403)

    def answer_broken(self, rest: str) -> None:
        self.answer(b"", 500)

    def answer_bomb(self, rest: str) -> None:
        """A few kB of PNG that would be 400 megapixels."""
        self.answer(BOMB, kind="image/png")

    def answer_gzip(self, rest: str) -> None:
        self.answer(gzip.compress(picture(1)), Content_Encoding="gzip")

    def answer_cut(self, rest: str) -> None:
        self.answer(picture(5, (200, 150))[:400])

    def answer_long(self, rest: str) -> None:
        self.answer(picture(1, (400, 20)))

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

    def answer_endless(self, rest: str) -> None:
        """One chunk, of length -1, which http.client would wait for in memory."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n")
        while True:
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
        time.sleep(2.5)

    def answer_flaky(self, rest: str) -> None:
        if self.server.hits[self.path] == 1:
            self.answer(b"", 503)
        else:
            self.answer_ok("3")

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def serving(port: int = 0, host: str = "127.0.0.1") -> Iterator[Web]:
    """A web that answers until the end of the block."""
    with Web(port, host) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()
