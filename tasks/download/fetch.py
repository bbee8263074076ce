"""Fetch one URL of an untrusted list, safely and politely.

urllib's own opener follows file:, ftp: and data: URLs and proxies, redirects into private networks,
reads bodies without limit, and its timeout is for one receive, so that a dripping server holds it
for ever. Names are resolved by the system; the worker's environment bounds how long it tries.
Not here: what a site may ask for (politeness.py).
"""

import email.utils
import hashlib
import http.client
import io
import socket
import ssl
import string
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from functools import partial
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urljoin, urlsplit
from urllib.request import Request

from tasks.download.config import DownloadConfig
from tasks.download.fetch_outcome import (
    BUSY_STATUSES,
    REFUSALS,
    RETRYABLE,
    Outcome,
    outcome_of,
    retry_after_s,
    with_retry_after,
)
from tasks.download.politeness import MAX_RULES_BYTES, HostGate, Robots, declines_use
from tasks.web_addresses import normalise_web_address

CHUNK_BYTES = 1 << 16
MAX_HEAD_BYTES = 1 << 20
"""For an answer's headers and the like; the body, with the lengths of its chunks, has twice
max_bytes on the wire."""
MAX_MESSAGE_CHARS = 500
"""A server's own words are part of some messages, which a shard's table keeps row by row."""
MAX_REDIRECTS = 10
REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAX_RULES_REDIRECTS = 5
"""Redirects of a robots.txt that are followed; RFC 9309 asks for at least five."""
REFUSED_TYPES = frozenset({"text/html", "application/xhtml+xml", "image/svg+xml"})
_NAT64 = IPv6Network("64:ff9b::/96")
_NEVER_PUBLIC = (
    ip_network("100.64.0.0/10"),  # carrier-grade NAT
    ip_network("192.0.0.0/24"),  # protocol assignments
    ip_network("192.88.99.0/24"),  # 6to4 relays
    ip_network("64:ff9b:1::/48"),  # local NAT64
    ip_network("100::/64"),  # discard
)


class Refused(Exception):
    """We will not fetch this; the message is its outcome's in `REFUSALS`."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(REFUSALS[outcome])


class Redirected(Exception):
    """The answer was a redirect to this URL."""


class FetchLimits(threading.local):
    """The config's limits, and when the URL that this thread fetches has to be done; one object
    serves all threads."""

    end = float("inf")

    def __init__(self, config: DownloadConfig) -> None:
        self.config = config

    def seconds_left(self) -> float:
        """Seconds that a server may be silent now; `Refused` when none is left."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise Refused(Outcome.DEADLINE)
        return min(left, self.config.timeout_s)


class Fetcher:
    """Fetches for the threads of one shard; remembers which hosts are busy, and their rules."""

    def __init__(self, config: DownloadConfig) -> None:
        self._config = config
        self._limits = FetchLimits(config)
        self._tls = ssl.create_default_context()
        manners = config.politeness
        token, self._rules = manners.user_agent_token, list[tuple[Outcome, Robots]]()
        self._hosts = HostGate(manners.host_connections, manners.rest_after, manners.max_rest_s)
        if manners.respect_robots:
            self._rules += [(Outcome.ROBOTS_TXT, Robots(self._fetch_rules, token, "robots.txt"))]
        if manners.respect_ai_txt:
            self._rules += [(Outcome.OPTED_OUT, Robots(self._fetch_rules, token, "ai.txt"))]
        contact = f"; +{manners.contact}" if manners.contact else ""
        self._headers = {
            "User-Agent": f"Mozilla/5.0 (compatible; {token}{contact})",
            "Accept": "image/*,*/*;q=0.5",
            "Connection": "close",
        }

    def fetch_image(self, url: str, digest: str | None = None) -> tuple[bytes | None, str | None]:
        """The body of `url`, with the hex hash `digest` if there is one; or None and why there is
        none. Tries again until it works, fails for good, or time or tries are used up."""
        config, message = self._config, ""
        earlier: str | None = None
        self._limits.end = time.monotonic() + config.deadline_s
        wait_s = config.politeness.retry_wait_s
        for tries_left in reversed(range(config.retries + 1)):
            body, message = self._try_once(url, digest)
            if body is not None:
                return body, None
            if message == REFUSALS[Outcome.DEADLINE] and earlier is not None:
                return None, earlier  # why it took long says more, and may pass another time
            may_pass = outcome_of("failed_to_download", message) in RETRYABLE
            pause_s = max(wait_s, retry_after_s(message))
            too_late = time.monotonic() + pause_s >= self._limits.end
            rests = message == REFUSALS[Outcome.RATE_LIMITED]
            if not may_pass or not tries_left or too_late or rests:
                break
            time.sleep(pause_s)
            wait_s, earlier = wait_s * 2, message
        return None, message

    def _try_once(self, url: str, digest: str | None) -> tuple[bytes | None, str]:
        """One attempt: the body, or why there is none.

        Every hop of a redirect holds a slot of its own host alone: with two at once, two hosts that
        redirect to each other could wait for each other.
        """
        try:
            for _ in range(MAX_REDIRECTS + 1):
                url = normalise_web_address(url)
                if "@" in urlsplit(url).netloc:
                    raise Refused(Outcome.BAD_URL)
                host = urlsplit(url).hostname or ""
                asked = time.monotonic()
                with self._hosts.get_slots(host):
                    self._limits.end += time.monotonic() - asked  # the wait was for others
                    if self._hosts.is_resting(host):
                        return None, REFUSALS[Outcome.RATE_LIMITED]
                    try:
                        return self._visit_host(url, host, digest), ""
                    except Redirected as redirect:
                        self._hosts.note_answer(host, busy=False, retry_after_s=0)
                        url = str(redirect)
            return None, f"HTTP Error 302: more than {MAX_REDIRECTS} redirects"
        # whatever a hostile answer makes the libraries raise is this URL's failure, not the shard's
        except Exception as error:
            return None, (str(error) or repr(error))[:MAX_MESSAGE_CHARS]

    def _visit_host(self, url: str, host: str, digest: str | None) -> bytes:
        """Ask for `url`, and tell the gate how its host answered; the text of whatever it raises
        says why there is no body."""
        config = self._config
        for outcome, rules in self._rules:
            if not rules.is_allowed(url):
                raise Refused(outcome)
        try:
            with self._open_url(url) as response:
                self._hosts.note_answer(host, busy=False, retry_after_s=0)
                if response.headers.get_content_type() in REFUSED_TYPES:
                    raise Refused(Outcome.NOT_AN_IMAGE_TYPE)
                self._refuse_declined(response.headers)
                body = response.read()
        except HTTPError as error:
            wanted_s = retry_after(error.headers.get("Retry-After"), datetime.now(UTC))
            busy = error.code in BUSY_STATUSES
            self._hosts.note_answer(host, busy=busy, retry_after_s=wanted_s or 0)
            raise OSError(with_retry_after(str(error), wanted_s)) from None
        if digest and hashlib.new(config.hash_algorithm, body).hexdigest() != digest.lower():
            raise Refused(Outcome.HASH_MISMATCH)
        return body

    @contextmanager
    def _open_url(self, url: str) -> Iterator[http.client.HTTPResponse]:
        """The answer to GET `url`, if it is neither a redirect nor an error."""
        request = Request(url)
        if request.type not in ("http", "https"):
            raise URLError(f"unknown url type: {request.type}")
        if not request.host:
            raise URLError("no host given")
        tls = self._tls if request.type == "https" else None
        with closing(_Connection(request.host, self._limits, tls)) as connection:
            try:
                connection.request("GET", request.selector, headers=self._headers)
            except OSError as error:
                raise URLError(error) from error
            with connection.getresponse() as response:
                status, headers, reason = response.status, response.headers, response.reason
                location = headers.get("Location", headers.get("URI"))
                if status in REDIRECTS and location is not None:
                    if urlsplit(location).scheme in ("http", "https", "ftp", ""):
                        self._refuse_declined(headers)
                        # http.client reads headers as ISO-8859-1
                        target = quote(location, encoding="iso-8859-1", safe=string.punctuation)
                        raise Redirected(urljoin(url, target))
                    reason += f" - Redirection to url '{location}' is not allowed"
                if not 200 <= status < 300:
                    raise HTTPError(url, status, reason, headers, None)
                if (response.length or 0) > self._config.max_bytes:
                    raise Refused(Outcome.TOO_MANY_BYTES)
                yield response

    def _refuse_declined(self, headers: http.client.HTTPMessage) -> None:
        manners = self._config.politeness
        token, directives = manners.user_agent_token, manners.disallowed_directives
        if declines_use(headers, token=token, directives=directives, tdm=manners.respect_tdm):
            raise Refused(Outcome.OPTED_OUT)

    def _fetch_rules(self, place: str) -> bytes | None:
        try:
            for _ in range(MAX_RULES_REDIRECTS + 1):
                try:
                    with self._open_url(place) as response:
                        return response.read(MAX_RULES_BYTES)
                except Redirected as redirect:
                    place = str(redirect)
            return None  # RFC 9309 2.3.1.2: as if there were none
        except HTTPError as error:
            if error.code < 500 and error.code not in BUSY_STATUSES:
                return None
            # RFC 9309: a host that cannot say must be taken to forbid, for now
            raise OSError(str(error)) from None


def retry_after(value: str | None, now: datetime) -> float | None:
    """Seconds that a Retry-After header asks to wait (RFC 9110 10.2.3); None if it says nothing."""
    text = (value or "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, (email.utils.parsedate_to_datetime(text) - now).total_seconds())
    except (ValueError, TypeError, OverflowError):  # TypeError: a date without a zone
        return None


class _Connection(http.client.HTTPConnection):
    """A connection to an address that was checked, under a deadline."""

    def __init__(self, host: str, limits: FetchLimits, tls: ssl.SSLContext | None) -> None:
        self.default_port = http.client.HTTP_PORT if tls is None else http.client.HTTPS_PORT
        super().__init__(host)
        self._limits = limits
        self._tls = tls
        self.response_class = partial(_Response, limits=limits)  # type: ignore[assignment]

    def connect(self) -> None:
        sock = _connect_allowed(self.host, self.port, self._limits)
        if self._tls is not None:
            try:
                sock.settimeout(self._limits.seconds_left())
                sock = self._tls.wrap_socket(sock, server_hostname=self.host)
            except BaseException:
                sock.close()
                raise
        self.sock = sock


def _connect_allowed(host: str, port: int, limits: FetchLimits) -> socket.socket:
    """Connect to the first address of `host` that may be connected to and answers.

    The very address that was checked is connected to: a second look-up could answer otherwise.
    """
    problem: Exception = Refused(Outcome.ADDRESS_REFUSED)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for family, kind, protocol, _, target in found:
        if not address_is_allowed(str(target[0]), limits.config.allowed_networks):
            continue
        left_s = limits.seconds_left()
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(left_s)
            sock.connect(target)
            return sock
        except OSError as error:
            sock.close()
            problem = error
    raise problem


class _Response(http.client.HTTPResponse):
    """An answer of bounded length, read under a deadline."""

    def __init__(
        self, sock: socket.socket, *args: Any, limits: FetchLimits, **options: Any
    ) -> None:
        super().__init__(sock, *args, **options)
        self._max_bytes = limits.config.max_bytes
        self.fp = io.BufferedReader(_DeadlineReader(self.fp.detach(), sock, limits))

    def read(self, amt: int | None = None) -> bytes:
        """Read the whole body (or `amt` bytes of it), which may not be longer than max_bytes or
        shorter than announced."""
        if amt is not None:
            return super().read(amt)
        body = bytearray()
        while part := super().read(CHUNK_BYTES):
            body += part
            if len(body) > self._max_bytes:
                raise Refused(Outcome.TOO_MANY_BYTES)
        if self.length:
            raise http.client.IncompleteRead(bytes(body), self.length)
        return bytes(body)


class _DeadlineReader(io.RawIOBase):
    """A socket's stream whose every receive knows how much time and how many bytes are left: a
    chunk of length -1 is, to http.client, everything that ever comes."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, limits: FetchLimits) -> None:
        super().__init__()
        self._raw = raw
        self._sock = sock
        self._limits = limits
        self._bytes_left = 2 * limits.config.max_bytes + MAX_HEAD_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(self._limits.seconds_left())
        try:
            received: int | None = self._raw.readinto(buffer)  # type: ignore[attr-defined]
        except TimeoutError:
            self._limits.seconds_left()
            raise
        self._bytes_left -= received or 0
        if self._bytes_left < 0:
            raise Refused(Outcome.TOO_MANY_BYTES)
        return received

    def close(self) -> None:
        self._raw.close()
        super().close()


def address_is_allowed(ip: str, allowed_networks: Sequence[str] = ()) -> bool:
    """Return whether `ip` is public, or inside one of `allowed_networks`.

    IPv6 addresses that carry an IPv4 address (mapped, 6to4, Teredo, NAT64) are judged by it, too.
    """
    address = ip_address(ip.partition("%")[0])
    if isinstance(address, IPv6Address):
        address = address.ipv4_mapped or address
    if any(address in ip_network(network) for network in allowed_networks):
        return True
    return _is_public(address) and all(map(_is_public, _embedded_addresses(address)))


def _embedded_addresses(address: IPv4Address | IPv6Address) -> list[IPv4Address]:
    """IPv4 addresses that a gateway may turn this IPv6 address into."""
    if isinstance(address, IPv4Address):
        return []
    found = [address.sixtofour, *(address.teredo or ())]
    if address in _NAT64:
        found.append(IPv4Address(int(address) & 0xFFFFFFFF))
    return [ip for ip in found if ip is not None]


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    # 6to4, Teredo and NAT64 prefixes are no addresses of their own: those in them decide
    carrier = bool(_embedded_addresses(address))
    return (
        (carrier or address.is_global)
        and not address.is_multicast
        and not (address.is_reserved and not carrier)
        and not (isinstance(address, IPv6Address) and address.is_site_local)
        and not any(address in network for network in _NEVER_PUBLIC)
    )
