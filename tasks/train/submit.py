"""Submit a job, stay until it is over: `python -m tasks.train.submit KIND SCRIPT NAME SECONDS`.

Covers: submitting, following (a look every SECONDS), cancelling on SIGTERM, going on with a job of
that name that an earlier process submitted and could not end.
Not here: what the job is (cluster.py); what came of it: that is in the run's folder.

Exit codes: 0 the job is over, however it ended; 75 it was cancelled on SIGTERM; 1 the cluster's
command fails, with its own words in the log.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import cast

from tasks.train.cluster import CLUSTERS, Cluster, Kind

OVER, CANCELLED, FAILED = 0, 75, 1
MAX_SILENT_S = 1800.0
"""How long the cluster may leave questions unanswered; its controller may be restarted."""
COMMAND_S = 120.0


def main(arguments: Sequence[str]) -> int:
    """Submit and follow; returns the exit code."""
    kind, script, name, every_s = arguments
    stop = threading.Event()

    def remember(number: int, frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, remember)
    job = _Job(CLUSTERS[cast(Kind, kind)], script, name)
    try:
        if job.is_over():
            job.submit_job()
        if job.follow_job(stop, float(every_s)):
            return OVER
        job.cancel_job()
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or ""
        sys.stderr.write(f"{error}: {said.strip()}\n")
        return FAILED
    return CANCELLED


class _Job:
    """One job of the cluster."""

    def __init__(self, cluster: Cluster, script: str, name: str) -> None:
        self._cluster = cluster
        self._places = {"script": script, "name": name}

    def submit_job(self) -> None:
        for command in self._cluster.submit:
            self._run_command(command)

    def is_over(self) -> bool:
        return self._cluster.is_over(self._run_command(self._cluster.state))

    def follow_job(self, stop: threading.Event, every_s: float) -> bool:
        """Wait until the job is over (True) or `stop` is set (False)."""
        answered = time.monotonic()
        while not stop.is_set():
            try:
                if self.is_over():
                    return True
                answered = time.monotonic()
            except subprocess.SubprocessError:
                if time.monotonic() - answered > MAX_SILENT_S:
                    raise
            stop.wait(every_s)
        return False

    def cancel_job(self) -> None:
        """Have the job ended, and stay until it is; if we are killed, the cluster ends it alone."""
        self._run_command(self._cluster.cancel)
        while not self.is_over():
            time.sleep(0.5)

    def _run_command(self, command: Sequence[str]) -> str:
        done = subprocess.run(
            [word.format(**self._places) for word in command],
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            # What stops us must not stop a submission half-way.
            start_new_session=True,
        )
        return done.stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
