"""Permissions of a host's robots.txt (RFC 9309).

Covers: asking each host once, the answer for a URL.
Not here: how its file is fetched (the caller's, with all its guards).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import quote, urlsplit, urlunsplit

MAX_BYTES = 512 * 1024
"""Rules beyond are not read; RFC 9309 asks for at least 500 KiB."""
ReadRules = Callable[[str], bytes | None]
"""URL of a robots.txt -> its content; None: there is none, and so no rule. May raise: unknown."""
_TOKEN = re.compile(r"\*|[A-Za-z0-9._-]+")
_ESCAPE = re.compile(r"%[0-9A-Fa-f]{2}")
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]")
_KEPT = "/%*$?=&:@!'()+,;~#[]"


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
    text = (content or b"")[:MAX_BYTES].decode("utf-8-sig", errors="replace")
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
