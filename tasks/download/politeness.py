"""Manners towards the sites that are asked: connections and rests per host, robots.txt (RFC 9309)
and ai.txt, and headers that decline the use of an image.

X-Robots-Tag: https://developers.google.com/search/docs/crawling-indexing/robots-meta-tag
TDMRep: https://www.w3.org/community/reports/tdmrep/CG-FINAL-tdmrep-20240510/
Content-Usage, in headers and robots.txt: draft-ietf-aipref-attach; Content-Signal: Cloudflare's.
ai.txt: Spawning's, in the grammar of robots.txt.
"""

import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, field
from email.message import Message
from typing import NamedTuple
from urllib.parse import quote, urlsplit, urlunsplit

MAX_RULES_BYTES = 512 * 1024
"""Rules beyond are not read; RFC 9309 asks for at least 500 KiB."""
ReadRules = Callable[[str], bytes | None]
"""URL of a robots.txt -> its content; None: there is none, and so no rule. May raise: unknown."""
_TOKEN = re.compile(r"(\*|[A-Za-z0-9._-]+)(?:/\S*)?")
"""A crawler's name, which a version may follow."""
_ESCAPE = re.compile(r"%[0-9A-Fa-f]{2}")
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]")
_KEPT = "/%*$?=&:@!'()+,;~#[]"
_WITH_A_VALUE = ("max-snippet", "max-image-preview", "max-video-preview", "unavailable_after")
"""Directives written `name: value`; every other name before a colon is a crawler's."""
_NO_TRAINING = re.compile(r"(?i)(?<![\w-])(?:train-ai\s*=\s*\"?n|ai-train\s*=\s*\"?no)(?![\w-])")


@dataclass
class _Host:
    slots: threading.Semaphore
    refusals: int = 0
    """Answers 429 or 503 in a row."""
    rests_until: float = float("-inf")


@dataclass
class HostGate:
    """Lets at most `connections` threads at once to each host; safe for threads."""

    connections: int
    rest_after: int
    max_rest_s: float
    clock: Callable[[], float] = time.monotonic
    _hosts: dict[str, _Host] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def get_slots(self, name: str) -> threading.Semaphore:
        """The host's connections; the wait for one is bounded, as every holder is under its
        deadline."""
        return self._get_host(name).slots

    def is_resting(self, name: str) -> bool:
        return self.clock() < self._get_host(name).rests_until

    def note_answer(self, name: str, *, busy: bool, retry_after_s: float) -> None:
        """Note an answer of the host: whether it refused for being `busy`, and for how long."""
        host = self._get_host(name)
        with self._lock:
            if not busy:
                host.refusals = 0
                return
            host.refusals += 1
            beyond = host.refusals - self.rest_after
            if beyond >= 0:
                rest_s = min(max(retry_after_s, 2.0 ** min(beyond, 30)), self.max_rest_s)
                host.rests_until = self.clock() + rest_s

    def _get_host(self, name: str) -> _Host:
        with self._lock:
            if name not in self._hosts:
                self._hosts[name] = _Host(threading.Semaphore(self.connections))
            return self._hosts[name]


class RobotsRules(NamedTuple):
    """The rules of a file that concern one crawler, about fetching and about training: (pattern,
    whether it allows)."""

    rules: list[tuple[str, bool]]
    usages: list[tuple[str, bool]]

    def allow(self, url: str) -> bool:
        """Return whether the most specific rule of both kinds allows `url`: the longest, of equal
        ones an allowing."""
        parts = urlsplit(url)
        path = _normalise(urlunsplit(("", "", parts.path or "/", parts.query, "")))
        path = path.replace("*", "%2A").replace("$", "%24")  # as a pattern means them literally
        if path == "/robots.txt":
            return True
        matching = (
            [(len(p), allows) for p, allows in rules if _matches(p, path)]
            for rules in (self.rules, self.usages)
        )
        return all(max(found, default=(0, True))[1] for found in matching)


class Robots:
    """The rules in the file `name` of the hosts met so far; safe for threads."""

    def __init__(self, read: ReadRules, token: str, name: str = "robots.txt") -> None:
        self._read = read
        self._token = token
        self._name = name
        self._rules: dict[str, RobotsRules] = {}
        self._reading = defaultdict[str, threading.Lock](threading.Lock)
        self._lock = threading.Lock()

    def is_allowed(self, url: str) -> bool:
        """Return whether we may fetch `url`; raises what reading the rules raised, and asks again
        then."""
        parts = urlsplit(url)
        place = urlunsplit((parts.scheme, parts.netloc, f"/{self._name}", "", ""))
        with self._lock:
            reading = self._reading[place]
        with reading:
            if place not in self._rules:
                self._rules[place] = parse_rules(self._read(place), self._token)
            return self._rules[place].allow(url)


def parse_rules(content: bytes | None, token: str) -> RobotsRules:
    """The rules for the crawler `token`: of all its groups, or else of all groups for everyone.

    Lines that cannot be understood forbid nothing.
    """
    kept = (content or b"")[:MAX_RULES_BYTES]
    if len(kept) == MAX_RULES_BYTES:
        kept = kept[: kept.rfind(b"\n") + 1]  # half a rule would be another one
    text = kept.decode("utf-8-sig", errors="replace").replace("\r", "\n")
    found: dict[str, RobotsRules] = {}
    named: list[RobotsRules] = []
    is_naming = False
    for line in text.split("\n"):
        name, _, value = (part.strip() for part in line.partition("#")[0].partition(":"))
        name = name.lower()
        if name == "user-agent":
            named = named if is_naming else []
            is_naming = True
            if agent := _TOKEN.match(value):
                named.append(found.setdefault(agent[1].lower(), RobotsRules([], [])))
        elif name in ("allow", "disallow"):
            is_naming = False
            for agent_rules in named:
                if value:  # an empty one allows everything, as no rule does
                    agent_rules.rules.append((_normalise_pattern(value), name == "allow"))
        elif name in ("content-usage", "content-signal"):
            is_naming = False
            place = value.split()[0] if value.startswith("/") else "/"
            rule = _normalise_pattern(place), not _NO_TRAINING.search(value)
            for agent_rules in named:
                agent_rules.usages.append(rule)
    ours = found.get(token.lower(), found.get("*"))
    return ours or RobotsRules([], [])


def _normalise_pattern(pattern: str) -> str:
    """A pattern in the form of paths; only its last `$` is an anchor."""
    normal = _normalise(pattern)
    return normal[:-1].replace("$", "%24") + normal[-1:]


def _normalise(path: str) -> str:
    """Octets that need no escape without one, all others with one in capitals (RFC 3986)."""

    def unescape(found: re.Match[str]) -> str:
        character = chr(int(found[0][1:], 16))
        return character if _UNRESERVED.fullmatch(character) else found[0].upper()

    return _ESCAPE.sub(unescape, quote(path, safe=_KEPT))


def _matches(pattern: str, path: str) -> bool:
    """Return whether a pattern with `*` and a final `$` matches the beginning of `path`.

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
    """Return whether an image that came with `headers` may not be used: by one of the X-Robots-Tag
    `directives` for everyone or for us (`token`), or, with `tdm`, by `tdm-reservation: 1` or
    `Content-Usage: train-ai=n`."""
    unwanted = {directive.strip().lower() for directive in directives}
    values = headers.get_all("X-Robots-Tag", [])
    if any(_for_us(str(value), token.lower()) & unwanted for value in values):
        return True
    if not tdm:
        return False
    reserved = any(str(v).strip() == "1" for v in headers.get_all("tdm-reservation", []))
    usages = headers.get_all("Content-Usage", [])
    return reserved or any(_NO_TRAINING.search(str(value)) for value in usages)


def _for_us(value: str, token: str) -> Set[str]:
    """Directives of one header line that are for everyone or for us; a name holds to its end."""
    addressee, found = "", set()
    for part in value.lower().split(","):
        name, colon, rest = (piece.strip() for piece in part.partition(":"))
        agent = _TOKEN.fullmatch(name)  # which a date after unavailable_after is not
        if colon and agent and name not in _WITH_A_VALUE:
            addressee, name = agent[1], rest
        if addressee in ("", "*", token):
            found |= {"noindex", "nofollow"} if name == "none" else {name}
    return found
