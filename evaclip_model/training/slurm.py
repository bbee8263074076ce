"""The place of a rank that Slurm's `srun` started, from Slurm's variables, as torch's launchers
would set it."""

from __future__ import annotations

import re
from collections.abc import Mapping

FIRST_PORT, PORTS = 12_000, 20_000
"""Below the range from which Linux gives ports to whoever asks for any."""


def place_from_slurm(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT of a task of `srun`; else nothing.

    Another launcher's RANK wins. Only steps count: the shell of a batch job has SLURM_PROCID and
    SLURM_NTASKS too, although it is the only process. The port follows from the job's number, so
    that two jobs that share a node do not meet; MASTER_ADDR and MASTER_PORT that are set stay.
    """
    if "RANK" in environ or "SLURM_STEP_NUM_TASKS" not in environ:
        return {}
    nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
    port = FIRST_PORT + int(environ["SLURM_JOB_ID"]) % PORTS
    return {
        "RANK": environ["SLURM_PROCID"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": environ.get("MASTER_ADDR") or first_host(nodes),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(port),
    }


def first_host(nodes: str) -> str:
    """The first machine of Slurm's node list: `gpu[003-005,9],cpu1` begins with `gpu003`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None, "the pattern matches the empty text"
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])
