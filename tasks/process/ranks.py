"""Ranks of a job: `python -m MODULE JOB RANK` once a rank, each of which does its share.

Ranks share files alone. One that gives up leaves a sentence for the user beside the job.
"""

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from subprocess import TimeoutExpired

from evaclip_model.errors import InputError
from evaclip_model.files import write_atomically
from tasks.process.child import start_supervised

GRACE_S = 2.0
"""A rank has nothing to save: what it has finished is in its place."""
POLL_S = 0.2


def run_ranks(module: str, job: Path, ranks: int, watch: Callable[[], None]) -> None:
    """Run every rank to its end, whether it succeeds or fails, on one thread, its log beside the
    job; InputError with the sentence of one that gave up. `watch` is called while they work, and
    at the end."""
    messages = [_message_file(job, rank) for rank in range(ranks)]
    for message in messages:
        message.unlink(missing_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        waiting = []
        for rank in range(ranks):
            command = [sys.executable, "-m", module, str(job), str(rank)]
            log = job.with_name(f"rank-{rank}.log")
            child = start_supervised(command, log=log, grace_s=GRACE_S, env=env)
            waiting.append(stack.enter_context(child))
        while waiting:
            with suppress(TimeoutExpired):
                waiting[0].wait(POLL_S)
                waiting.pop(0)
            watch()
            for message in messages:
                if message.is_file():
                    raise InputError(message.read_text())


def run_share(work: Callable[[Path, int], None]) -> int:
    """Main program of a rank: its exit status, 2 after a user's mistake."""
    job, rank = Path(sys.argv[1]), int(sys.argv[2])
    try:
        work(job, rank)
    except InputError as error:
        write_atomically(_message_file(job, rank), str(error))
        return 2
    return 0


def _message_file(job: Path, rank: int) -> Path:
    return job.with_name(f"message-{rank}.txt")
