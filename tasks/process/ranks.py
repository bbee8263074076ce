"""Ranks of a job that share files alone: every rank does its share of a list, by its place among
them, so that none waits for another. They are processes of this machine, or of those that a
launcher of trainings starts them on (launch.py).

A rank says how far it is in a file beside the job, and leaves a sentence for the user if it gives
up: whoever started the ranks reads those, however much work there is.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from shlex import quote
from subprocess import TimeoutExpired

from evaclip_model.config import Config
from evaclip_model.errors import InputError
from evaclip_model.files import write_atomically
from evaclip_model.training.worker import place_from_slurm
from tasks.process.child import run_supervised, start_supervised
from tasks.process.cluster import Program
from tasks.process.launch import RankLaunch, start_command

GRACE_S = 2.0
"""A rank has nothing to save: what it has finished is in its place."""
LAUNCHED_GRACE_S = 20.0
"""For the launcher to end ranks elsewhere."""
POLL_S, LAUNCHED_POLL_S = 0.2, 2.0
LOG = "ranks.log"


class RankState(Config):
    """Progress of a rank, for whoever started it."""

    done: int = 0
    """Samples."""
    detail: str = ""
    failed: Mapping[str, str] = {}
    """What cannot be done -> the reason, once the rank is done."""
    share_of_peak: float | None = None
    """Of what its device can compute, where that is known."""


def say_state(job: Path, rank: int, state: RankState) -> None:
    """Leave a rank's state beside its job."""
    file = job.with_name(f"state-{rank}.json")
    write_atomically(file, state.model_dump_json(), sync=False)


def run_ranks(
    module: str,
    job: Path,
    ranks: int,
    watch: Callable[[Sequence[RankState]], None],
    launch: RankLaunch | None = None,
    reads: tuple[Path, ...] = (),
) -> None:
    """Run every rank to its end, whether it succeeds or fails, its log beside the job; InputError
    with the sentence of one that gave up. `watch` gets their states while they work, and at the
    end. A `launch` over machines starts its own number of ranks; `reads` must be mounted there."""
    for old in (*job.parent.glob("state-*.json"), *job.parent.glob("message-*.txt")):
        old.unlink()

    def look() -> None:
        states = sorted(job.parent.glob("state-*.json"))
        watch([RankState.model_validate_json(state.read_bytes()) for state in states])
        for message in sorted(job.parent.glob("message-*.txt")):
            raise InputError(message.read_text())

    if launch is None or launch.is_local:
        _run_here(module, job, ranks, look)
    else:
        log = job.with_name(LOG)
        over = f"[ ! -e {quote(str(job))} ]"
        command = start_command(launch, Program(module, job, log, reads, over), launch.ranks)
        run_supervised(
            command, log=log, grace_s=LAUNCHED_GRACE_S, poll=look, poll_s=LAUNCHED_POLL_S
        )
    look()


def _run_here(module: str, job: Path, ranks: int, look: Callable[[], None]) -> None:
    """All ranks on this machine, on one thread each."""
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks)}
    command = [sys.executable, "-m", module, str(job)]
    with ExitStack() as stack:
        waiting = []
        for rank in range(ranks):
            log, env = job.with_name(f"rank-{rank}.log"), {**shared, "RANK": str(rank)}
            child = start_supervised(command, log=log, grace_s=GRACE_S, env=env)
            waiting.append(stack.enter_context(child))
        while waiting:
            with suppress(TimeoutExpired):
                waiting[0].wait(POLL_S)
                waiting.pop(0)
            look()


def run_share(work: Callable[[Path, int, int], None]) -> int:
    """Main program of a rank, which gets the job, its number and how many there are: its exit
    status, 2 after a user's mistake."""
    job, place = Path(sys.argv[1]), {**os.environ, **place_from_slurm(os.environ)}
    rank = int(place["RANK"])
    try:
        work(job, rank, int(place["WORLD_SIZE"]))
    except InputError as error:
        write_atomically(job.with_name(f"message-{rank}.txt"), str(error))
        return 2
    return 0
