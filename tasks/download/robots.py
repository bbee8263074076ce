"""What a host's robots.txt allows us (RFC 9309).

Covers: asking each host once, the answer for a URL.
Not here: how its file is fetched (the caller's, with all its guards).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit, urlunsplit
from urllib.robotparser import RobotFileParser

MAX_BYTES = 512 * 1024
"""Rules beyond are not read; RFC 9309 asks for at least 500 KiB."""
ReadRules = Callable[[str], bytes | None]
"""URL of a robots.txt -> its content; None: there is none, and so no rule. May raise: unknown."""


@dataclass
class _Entry:
    lock: threading.Lock = field(default_factory=threading.Lock)
    rules: RobotFileParser | None = None


class Robots:
    """The rules of the hosts met so far; safe for threads."""

    def __init__(self, read: ReadRules, token: str) -> None:
        self._read = read
        self._token = token
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.Lock()

    def allows(self, url: str) -> bool:
        """Whether we may fetch `url`; raises what reading the rules raised, and asks again then."""
        parts = urlsplit(url)
        place = urlunsplit((parts.scheme, parts.netloc, "/robots.txt", "", ""))
        with self._lock:
            entry = self._entries.setdefault(place, _Entry())
        with entry.lock:
            if entry.rules is None:
                entry.rules = parse_rules(self._read(place))
            return entry.rules.can_fetch(self._token, url)


def parse_rules(content: bytes | None) -> RobotFileParser:
    """The rules in a robots.txt; whatever cannot be understood in it forbids nothing."""
    rules = RobotFileParser()
    rules.parse((content or b"")[:MAX_BYTES].decode(errors="replace").splitlines())
    return rules
