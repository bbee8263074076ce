"""What processes listen on while something runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

LOOPBACK = frozenset({"127.0.0.1", "::1", "::ffff:127.0.0.1"})


@contextmanager
def listening_addresses() -> Iterator[set[str]]:
    """Addresses that processes below this one listen on while the context lasts."""
    seen: set[str] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            for process in psutil.Process().children(recursive=True):
                try:
                    connections = process.net_connections(kind="inet")
                except psutil.Error:  # it ended meanwhile
                    continue
                seen.update(c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()
