"""Starting the ranks of a training run: command lines and environments, as pure functions.

Not here: running any of it (train.py); jobs of Slurm and Kubernetes (cluster.py).

Every rank gets the path of the job file and no other argument: launchers mix their options with
those of what they launch.
"""

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote

from evaclip_model.errors import InputError
from evaclip_model.training.config import ERROR_FILE, RANK_STORE, RESULT_FILE
from tasks.train.config import Launch

WORKER = "evaclip_model.training.worker"
LOOPBACK = "127.0.0.1"
CPU_RANKS = 2
"""Ranks on a machine without GPUs: the least that shards anything, and few for a laptop."""
_HOST = re.compile(r"(\S+)\s+slots=(\d+)\s*")


def default_ranks(cores: int, gpus: int, lanes: int) -> int:
    """Ranks when no number is set: one a GPU, or two on a CPU that has the cores; fewer where
    `lanes` cannot be shared out among them, so that a machine that lost a GPU goes on."""
    wanted = gpus or min(CPU_RANKS, cores)
    return max(ranks for ranks in range(1, wanted + 1) if lanes % ranks == 0)


def count_gpus(visible: str | None, devices: Path = Path("/dev")) -> int:
    """GPUs that `visible` (CUDA_VISIBLE_DEVICES) leaves of this machine's; torch is slow to ask."""
    if visible is not None:
        return len([one for one in visible.split(",") if one.strip() not in ("", "-1")])
    return len(list(devices.glob("nvidia[0-9]*")))


def default_read_workers(cores: int, ranks: int, gpus: int) -> int:
    """Processes of each rank that read: a GPU's rank needs one core itself, a CPU's all it has."""
    return max(0, cores // ranks - 1) if gpus else 0


def torchrun_command(job: Path, launch: Launch, ranks: int) -> list[str]:
    """The command that every machine runs: `ranks` ranks each, which meet at the rendezvous; on a
    single machine torchrun without a port, or one process."""
    if launch.nodes > 1:
        # The run's folder as id: another run at the same meeting point is not joined.
        meeting = [f"--rdzv-endpoint={launch.rendezvous}", f"--rdzv-id={job.parent.name}"]
    elif ranks == 1:
        return [sys.executable, "-m", WORKER, str(job)]
    else:
        # Without an endpoint the agent's store is a temporary file that only this user can open.
        meeting = ["--rdzv-conf=store_type=file", f"--local-addr={LOOPBACK}"]
    run = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", *meeting]
    return [*run, f"--nnodes={launch.nodes}", f"--nproc-per-node={ranks}", "-m", WORKER, str(job)]


def join_script(words: Sequence[str], run_dir: Path) -> str:
    """The script of the other machines: their part of the ranks, until the stage is over."""
    over = " || ".join(f"[ -e {quote(str(run_dir / name))} ]" for name in (RESULT_FILE, ERROR_FILE))
    return f"#!/bin/sh\nuntil {over}; do {shlex.join(words)}; sleep 5; done\n"


def deepspeed_command(job: Path, hostfile: Path, hosts: Mapping[str, int], port: int) -> list[str]:
    """The deepspeed launcher over `hosts`; a single one is taken to be this machine, without ssh.
    Ranks meet on `port` of the first machine."""
    # It would put `--local_rank=N` before the job file.
    plain = ["--no_local_rank", f"--master_port={port}", "--module", WORKER, str(job)]
    here = ["--no_ssh_check", f"--master_addr={LOOPBACK}"] if len(hosts) == 1 else []
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={hostfile}"]
    return [*runner, *here, *plain]


def read_hostfile(path: Path) -> dict[str, int]:
    """Machines of a deepspeed hostfile and the processes of each, in their order. InputError: it
    cannot be read (the launcher itself would go on with this machine alone), or a line is not
    `name slots=N`."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise InputError(
            f"EVACLIP_HOSTFILE={path} cannot be read ({error.strerror}): give a file with lines "
            "`name slots=PROCESSES`"
        ) from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not (text := line.partition("#")[0].strip()):
            continue
        found = _HOST.fullmatch(text)
        if found is None or not int(found[2]) or found[1] in hosts:
            raise InputError(
                f"{path}, line {number}: '{text}' must be `name slots=PROCESSES`, each name once"
            )
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise InputError(f"{path} names no machine: write a line `name slots=PROCESSES` for each")
    return hosts


def external_command(job: Path, launch: Launch) -> list[str]:
    """The user's own command with its places filled in; InputError: it names others, or is none."""
    places = {"job": job, "run_dir": job.parent, "ranks": launch.ranks, "nodes": launch.nodes}
    try:
        words = [word.format(**places) for word in shlex.split(launch.submit_command or "")]
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(
            "EVACLIP_SUBMIT_COMMAND is not a command with the placeholders {job}, {run_dir}, "
            f"{{ranks}}, {{nodes}} ({error}): write a brace that is meant as itself twice"
        ) from None
    if not words:
        raise InputError("EVACLIP_SUBMIT_COMMAND is empty: give the command that starts all ranks")
    return words


def rank_environment(
    base: Mapping[str, str], ranks: int, cores: int, store: Path
) -> dict[str, str]:
    """`base` for the ranks of this machine: its cores shared out, nothing that others can reach.
    `store` is a file that is not there yet, in a folder of this user's alone."""
    return {
        "NCCL_SOCKET_IFNAME": "lo",
        **base,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": str(max(1, cores // ranks)),
        "PYTHONUNBUFFERED": "1",
        RANK_STORE: str(store),
        # torchrun would else open a TCPStore, on all networks, for the ranks to use
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
