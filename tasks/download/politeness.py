"""Manners towards the sites that are asked: connections and rests per host, robots.txt (RFC 9309),
and headers that decline the use of an image (X-Robots-Tag, TDM Reservation Protocol).

X-Robots-Tag: https://developers.google.com/search/docs/crawling-indexing/robots-meta-tag
TDMRep: https://www.w3.org/community/reports/tdmrep/CG-FINAL-tdmrep-20240510/
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from urllib.parse import quote, urlsplit, urlunsplit

MAX_RULES_BYTES = 512 * 1024
"""Rules beyond are not read; RFC 9309 asks for at least 500 KiB."""
ReadRules = Callable[[str], bytes | None]
"""URL of a robots.txt -> its content; None: there is none, and so no rule. May raise: unknown."""
_TOKEN = re.compile(r"\*|[A-Za-z0-9._-]+")
_ESCAPE = re.compile(r"%[0-9A-Fa-f]{2}")
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]")
_KEPT = "/%*$?=&:@!'()+,;~#[]"
_WITH_A_VALUE = frozenset(
    {"max-snippet", "max-image-preview", "max-video-preview", "unavailable_after"}
)
"""Directives written `name: value`; every other name before a colon is a crawler's."""


@dataclass
class _Host:
    slots: threading.Semaphore
    refusals: int = 0
    """Answers 429 or 503 in a row."""
    rests_until: float = field(default=float("-inf"))


class HostGate:
    """Lets at most `connections` threads at once to each host; safe for threads."""

    def __init__(
        self,
        connections: int,
        rest_after: int,
        max_rest_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connections = connections
        self._rest_after = rest_after
        self._max_rest_s = max_rest_s
        self._clock = clock
        self._hosts: dict[str, _Host] = {}
        self._lock = threading.Lock()

    @contextmanager
    def hold_slot(self, name: str) -> Iterator[None]:
        """Hold one of the host's slots; waits until one is free.

        The wait is bounded: every holder is under its deadline, and no more threads wait than
        there are.
        """
        host = self._get_host(name)
        with host.slots:
            yield

    def is_resting(self, name: str) -> bool:
        """Whether the host is to be left alone now."""
        with self._lock:
            host = self._hosts.get(name)
            return host is not None and self._clock() < host.rests_until

    def note_answer(self, name: str, *, busy: bool, retry_after_s: float) -> None:
        """Note an answer of the host.

        Args:
            busy: it was a refusal for being busy.
            retry_after_s: how long the host asked to wait; 0 if it did not say.
        """
        host = self._get_host(name)
        with self._lock:
            if not busy:
                host.refusals = 0
                return
            host.refusals += 1
            beyond = host.refusals - self._rest_after
            if beyond >= 0:
                rest_s = min(max(retry_after_s, 2.0 ** min(beyond, 30)), self._max_rest_s)
                host.rests_until = self._clock() + rest_s

    def _get_host(self, name: str) -> _Host:
        with self._lock:
            if name not in self._hosts:
                self._hosts[name] = _Host(threading.Semaphore(self._connections))
            return self._hosts[name]


@dataclass(frozen=True)
class RobotsRules:
    """The rules of a file that concern one crawler: (pattern, whether it allows)."""

    rules: tuple[tuple[str, bool], ...]

    def allow(self, url: str) -> bool:
        """Whether the most specific rule allows `url`: the longest, of equal ones an allowing."""
        parts = urlsplit(url)
        path = _normalise(urlunsplit(("", "", parts.path or "/", parts.query, "")))
        if path == "/robots.txt":
            return True
        matching = [(len(p), allows) for p, allows in self.rules if _matches(p, path)]
        return max(matching, default=(0, True))[1]


@dataclass
class _Entry:
    lock: threading.Lock = field(default_factory=threading.Lock)
    rules: RobotsRules | None = None


class Robots:
    """The rules of the hosts met so far; safe for threads."""

    def __init__(self, read: ReadRules, token: str) -> None:
        self._read = read
        self._token = token
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.Lock()

    def is_allowed(self, url: str) -> bool:
        """Whether we may fetch `url`; raises what reading the rules raised, and asks again then."""
        parts = urlsplit(url)
        place = urlunsplit((parts.scheme, parts.netloc, "/robots.txt", "", ""))
        with self._lock:
            entry = self._entries.setdefault(place, _Entry())
        with entry.lock:
            if entry.rules is None:
                entry.rules = parse_rules(self._read(place), self._token)
            return entry.rules.allow(url)


def parse_rules(content: bytes | None, token: str) -> RobotsRules:
    """The rules for the crawler `token`: of all its groups, or else of all groups for everyone.

    Lines that cannot be understood forbid nothing.
    """
    text = (content or b"")[:MAX_RULES_BYTES].decode("utf-8-sig", errors="replace")
    found: dict[str, list[tuple[str, bool]]] = {}
    agents: list[str] = []
    is_naming = False
    for line in text.splitlines():
        name, _, value = (part.strip() for part in line.partition("#")[0].partition(":"))
        name = name.lower()
        if name == "user-agent":
            agents = agents if is_naming else []
            is_naming = True
            agent = _TOKEN.match(value)
            if agent:
                agents.append(agent[0].lower())
                found.setdefault(agents[-1], [])
        elif name in ("allow", "disallow"):
            is_naming = False
            for agent_name in agents:
                if value:  # an empty one allows everything, as no rule does
                    found[agent_name].append((_normalise(value), name == "allow"))
    return RobotsRules(tuple(found.get(token.lower(), found.get("*", []))))


def _normalise(path: str) -> str:
    """Octets that need no escape without one, all others with one in capitals (RFC 3986)."""

    def unescape(found: re.Match[str]) -> str:
        character = chr(int(found[0][1:], 16))
        return character if _UNRESERVED.fullmatch(character) else found[0].upper()

    return _ESCAPE.sub(unescape, quote(path, safe=_KEPT))


def _matches(pattern: str, path: str) -> bool:
    """Whether a pattern with `*` and a final `$` matches the beginning of `path`.

    Each piece is taken where it comes first: no backtracking, whatever a stranger writes.
    """
    is_anchored = pattern.endswith("$")
    first, *others = pattern.removesuffix("$").split("*")
    if not path.startswith(first):
        return False
    at = len(first)
    last = others.pop() if others and is_anchored else None
    for piece in others:
        at = path.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    if last is not None:
        return path.endswith(last) and len(path) - len(last) >= at
    return not is_anchored or at == len(path)


def declines_use(headers: Message, *, token: str, directives: Iterable[str], tdm: bool) -> bool:
    """Whether an image that came with `headers` may not be used.

    Args:
        token: our name; directives addressed to others do not concern us.
        directives: X-Robots-Tag values that decline.
        tdm: whether `tdm-reservation: 1` declines, too.
    """
    unwanted = {directive.strip().lower() for directive in directives}
    values = headers.get_all("X-Robots-Tag", [])
    if any(_for_us(str(value), token.lower()) & unwanted for value in values):
        return True
    return tdm and str(headers.get("tdm-reservation", "")).strip() == "1"


def _for_us(value: str, token: str) -> Set[str]:
    """Directives of one header line that are for everyone or for us; a name holds to its end."""
    addressee, found = "", set()
    for part in value.lower().split(","):
        name, colon, rest = (piece.strip() for piece in part.partition(":"))
        if colon and name not in _WITH_A_VALUE:
            addressee, name = name, rest
        if addressee in ("", "*", token):
            found.add(name)
    return found
