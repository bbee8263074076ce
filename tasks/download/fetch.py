"""Fetch one URL of an untrusted list, safely: what replaces urllib's defaults in the downloader.

Covers: http and https only; the address of every connection checked, redirects included; bytes
and total time bounded; no proxy; pages and SVG refused; retries of what may pass.
Not here: what is done with the bytes; the rule about addresses (addresses.py).

urllib's own opener follows file:, ftp: and data: URLs, redirects into private networks, reads
bodies without limit, and its timeout is for one receive, so that a dripping server holds it for
ever. Names are resolved by the system, whose own time-outs are not under the deadline.
"""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tasks.download import outcome
from tasks.download.addresses import address_is_allowed
from tasks.download.config import DownloadConfig

CHUNK_BYTES = 1 << 16
REFUSED_TYPES = frozenset({"text/html", "application/xhtml+xml", "image/svg+xml"})
Fetch = Callable[[], tuple[io.BytesIO | None, str | None]]
"""One attempt: the body, or why there is none."""


class Refused(Exception):
    """We will not fetch this; the message is one of the constants of outcome.py."""


@dataclass(frozen=True)
class Limits:
    """What a fetch may do; the part of the config that the opener needs."""

    allowed_networks: tuple[str, ...]
    max_bytes: int
    deadline_s: float
    retries: int
    retry_wait_s: float

    @classmethod
    def of(cls, config: DownloadConfig) -> Limits:
        return cls(
            config.allowed_networks,
            config.max_bytes,
            config.deadline_s,
            config.retries,
            config.retry_wait_s,
        )


class Deadline(threading.local):
    """When the URL that this thread fetches has to be done; one object serves all threads."""

    def __init__(self) -> None:
        self.end = float("inf")

    def start(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self, at_most: float | None = None) -> float:
        """Seconds left, no more than `at_most`.

        Raises:
            Refused: none is left.
        """
        left = self.end - time.monotonic()
        if left <= 0:
            raise Refused(outcome.DEADLINE)
        return left if at_most is None else min(left, at_most)


def guarded_opener(limits: Limits, deadline: Deadline) -> urllib.request.OpenerDirector:
    """An opener that can do nothing but GET from public addresses, within `limits`."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        _GuardedHandler(limits, deadline),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def fetch_with_retries(
    fetch: Fetch, limits: Limits, deadline: Deadline
) -> tuple[io.BytesIO | None, str | None]:
    """Try `fetch` until it works, fails for good, or time or tries are used up."""
    deadline.start(limits.deadline_s)
    wait_s = limits.retry_wait_s
    for tries_left in reversed(range(limits.retries + 1)):
        body, message = fetch()
        if message is None:
            return body, None
        may_pass = outcome.outcome_of("failed_to_download", message) in outcome.RETRYABLE
        if not may_pass or not tries_left or time.monotonic() + wait_s >= deadline.end:
            break
        time.sleep(wait_s)
        wait_s *= 2
    return None, message


class _GuardedHandler(urllib.request.AbstractHTTPHandler):
    """Opens http and https URLs over guarded connections, and looks at the answer's headers."""

    def __init__(self, limits: Limits, deadline: Deadline) -> None:
        super().__init__()
        self._limits = limits
        self._deadline = deadline
        self._tls = ssl.create_default_context()

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self._answer(request, None)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self._answer(request, self._tls)

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        return self.do_request_(request)  # type: ignore[attr-defined, no-any-return]

    def http_response(
        self, request: urllib.request.Request, response: http.client.HTTPResponse
    ) -> http.client.HTTPResponse:
        if 200 <= response.status < 300:
            if response.headers.get_content_type() in REFUSED_TYPES:
                raise Refused(outcome.NOT_AN_IMAGE_TYPE)
            if response.length is not None and response.length > self._limits.max_bytes:
                raise Refused(outcome.TOO_MANY_BYTES)
        return response

    https_request = http_request
    https_response = http_response

    def _answer(
        self, request: urllib.request.Request, tls: ssl.SSLContext | None
    ) -> http.client.HTTPResponse:
        connection = partial(_Connection, limits=self._limits, deadline=self._deadline, tls=tls)
        return self.do_open(connection, request)  # type: ignore[arg-type, return-value]


class _Connection(http.client.HTTPConnection):
    """A connection to an address that was checked, under a deadline."""

    def __init__(
        self,
        host: str,
        *,
        limits: Limits,
        deadline: Deadline,
        tls: ssl.SSLContext | None,
        **options: Any,
    ) -> None:
        self.default_port = http.client.HTTP_PORT if tls is None else http.client.HTTPS_PORT
        super().__init__(host, **options)
        self._limits = limits
        self._deadline = deadline
        self._tls = tls
        self.response_class = partial(  # type: ignore[assignment]
            _Response, timeout_s=self.timeout, max_bytes=limits.max_bytes, deadline=deadline
        )

    def connect(self) -> None:
        sock = _connect(
            self.host, self.port, self._limits.allowed_networks, self._deadline, self.timeout
        )
        if self._tls is not None:
            try:
                sock.settimeout(self._deadline.left(self.timeout))
                sock = self._tls.wrap_socket(sock, server_hostname=self.host)
            except BaseException:
                sock.close()
                raise
        self.sock = sock


def _connect(
    host: str,
    port: int,
    allowed_networks: Sequence[str],
    deadline: Deadline,
    timeout_s: float | None,
) -> socket.socket:
    """Connect to the first address of `host` that may be connected to and answers.

    The very address that was checked is connected to: a second look-up could answer otherwise.
    """
    problem: Exception = Refused(outcome.ADDRESS_REFUSED)
    for family, kind, protocol, _, target in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM
    ):
        if not address_is_allowed(str(target[0]), allowed_networks):
            continue
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(deadline.left(timeout_s))
            sock.connect(target)
        except OSError as error:
            sock.close()
            problem = error
        except Refused:
            sock.close()
            raise
        else:
            return sock
    raise problem


class _Response(http.client.HTTPResponse):
    """An answer of bounded length, read under a deadline."""

    def __init__(
        self,
        sock: socket.socket,
        *args: Any,
        timeout_s: float | None,
        max_bytes: int,
        deadline: Deadline,
        **options: Any,
    ) -> None:
        super().__init__(sock, *args, **options)
        self._max_bytes = max_bytes
        raw = _DeadlineReader(self.fp.detach(), sock, timeout_s, deadline)
        self.fp = io.BufferedReader(raw)

    def read(self, amt: int | None = None) -> bytes:
        """Read the whole body (or `amt` bytes of it).

        Raises:
            Refused: it is longer than max_bytes, or takes longer than the deadline.
            http.client.IncompleteRead: it ends before the announced length.
        """
        if amt is not None:
            return super().read(amt)
        parts: list[bytes] = []
        size = 0
        while part := super().read(CHUNK_BYTES):
            size += len(part)
            if size > self._max_bytes:
                raise Refused(outcome.TOO_MANY_BYTES)
            parts.append(part)
        if self.length:
            raise http.client.IncompleteRead(b"".join(parts), self.length)
        return b"".join(parts)


class _DeadlineReader(io.RawIOBase):
    """A socket's stream whose every receive knows how much time is left."""

    def __init__(
        self, raw: io.RawIOBase, sock: socket.socket, timeout_s: float | None, deadline: Deadline
    ) -> None:
        super().__init__()
        self._raw = raw
        self._sock = sock
        self._timeout_s = timeout_s
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(self._deadline.left(self._timeout_s))
        try:
            return self._raw.readinto(buffer)  # type: ignore[attr-defined, no-any-return]
        except TimeoutError:
            self._deadline.left()
            raise

    def close(self) -> None:
        self._raw.close()
        super().close()
