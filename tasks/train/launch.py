"""How the ranks of a training run are started on this machine.

Covers: the command line and the environment, as pure functions.
Not here: running it (train.py); clusters.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

CPU_RANKS = 2
"""Ranks on a machine without GPUs: the least that shards anything, and few for a laptop."""


def default_ranks(cores: int, gpus: int) -> int:
    """Ranks when nobody chose: one a GPU, or two on a CPU that has the cores."""
    return gpus or min(CPU_RANKS, cores)


def count_gpus(visible: str | None, devices: Path = Path("/dev")) -> int:
    """GPUs that `visible` (CUDA_VISIBLE_DEVICES) leaves of this machine's; torch is slow to ask."""
    if visible is not None:
        return len([one for one in visible.split(",") if one.strip() not in ("", "-1")])
    return len(list(devices.glob("nvidia[0-9]*")))


def default_read_workers(cores: int, ranks: int, gpus: int) -> int:
    """Processes of each rank that read: a GPU's rank needs one core itself, a CPU's all it has."""
    return max(0, cores // ranks - 1) if gpus else 0


def command(job: Path, ranks: int) -> list[str]:
    """What starts `ranks` ranks of the job file: torchrun on loopback, or one plain process."""
    worker = ["evaclip_model.training.worker", str(job)]
    if ranks == 1:
        return [sys.executable, "-m", *worker]
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    # Port 0: the launcher takes a free one, so that two runs on a machine never meet.
    meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    return [*launcher, *meeting, "--nnodes=1", f"--nproc-per-node={ranks}", "-m", *worker]


def environment(base: Mapping[str, str], ranks: int, cores: int, use_gpus: bool) -> dict[str, str]:
    """`base` with the cores shared out over the ranks, and gloo kept on loopback without GPUs."""
    threads = str(max(1, cores // ranks))
    changed = {**base, "OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
    return changed if use_gpus else {**changed, "GLOO_SOCKET_IFNAME": "lo"}
