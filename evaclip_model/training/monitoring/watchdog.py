"""A rank that makes no more steps says where it hangs, and ends, so that the run can be resumed.

Covers: a heartbeat file per rank, stacks of all threads on a signal or when steps stop.
Not here: starting the ranks again (tasks/train, or the cluster's launcher).

Ranks that wait for a stuck one make no step either: each writes its own stacks, and none ends
before the others had time to write theirs, because the end of one breaks the connections of all.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from evaclip_model.files import write_atomically

GRACE_S = 5.0
"""Seconds between the stacks and the end."""
HEARTBEAT_S = 10.0
"""Seconds between heartbeats at least: steps may be short, and file systems slow."""
CRASHED = 1
"""Exit code of a rank that hung: that of a crash, after which the newest checkpoint holds."""


class Watchdog:
    """Watches this process; a context: what runs in it must call `beat` every now and then."""

    def __init__(
        self, run_dir: Path, rank: int, limit_s: float, *, grace_s: float = GRACE_S
    ) -> None:
        """Args:
        limit_s: seconds without a beat after which the stacks are written.
        grace_s: seconds after that before the process ends.
        """
        self._grace_s = grace_s
        self._stacks_path = run_dir / f"stacks-{rank}.txt"
        self._heartbeat = run_dir / f"heartbeat-{rank}.json"
        self._limit_s = limit_s
        self._last = time.monotonic()
        self._written = -HEARTBEAT_S
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch_steps, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._stacks = self._stacks_path.open("a")
        faulthandler.register(signal.SIGUSR1, file=self._stacks, all_threads=True)
        self._arm_traceback()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGUSR1)
        self._stacks.close()
        if not self._stacks_path.stat().st_size:
            self._stacks_path.unlink()

    def report_step(self, step: int) -> None:
        """Say that step `step` is done."""
        self._last = time.monotonic()
        self._arm_traceback()
        if self._last - self._written >= HEARTBEAT_S:
            self._written = self._last
            beat = json.dumps({"step": step, "time": time.time()}) + "\n"
            # A step does not wait for the disk; a heartbeat means nothing after a power cut.
            write_atomically(self._heartbeat, beat, sync=False)

    def _arm_traceback(self) -> None:
        # A thread of Python's own does not run while foreign code holds the interpreter; this one
        # does, and ends the process should the thread below not have.
        late = self._limit_s + 2 * self._grace_s
        faulthandler.dump_traceback_later(late, exit=True, file=self._stacks)

    def _watch_steps(self) -> None:
        while not self._ended.wait(self._last + self._limit_s - time.monotonic()):
            if time.monotonic() - self._last < self._limit_s:
                continue
            print(f"no step for {self._limit_s:g} s", file=self._stacks, flush=True)
            faulthandler.dump_traceback(self._stacks, all_threads=True)
            if not self._ended.wait(self._grace_s):
                os._exit(CRASHED)
