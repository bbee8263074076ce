"""Politeness: how many connections a host gets at once, and when it is left alone.

Covers: slots of each host, rests after refusals for being busy.
Not here: the order of URLs (the merge mixes hosts), robots.txt.

One gate serves the threads of one shard; processes do not know of each other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


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
