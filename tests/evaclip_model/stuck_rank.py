"""One rank under a watchdog. "stuck": rank 1 hangs after its first step and rank 0 waits for it;
"slow": one long step; "steady": many short ones, which together take longer than the limit."""

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from evaclip_model.training.monitoring.guards import Watchdog


def hang():
    while True:
        time.sleep(0.1)


def slow():
    end = time.monotonic() + 1
    while time.monotonic() < end:
        time.sleep(0.01)


def main(folder, limit_s, behaviour):
    dist.init_process_group("gloo")
    with Watchdog(folder, dist.get_rank(), limit_s, grace_s=1.0) as watchdog:
        watchdog.report_step(1)
        if behaviour == "stuck":
            if dist.get_rank() == 1:
                hang()
            dist.all_reduce(torch.zeros(1))
        elif behaviour == "slow":
            slow()
        else:
            for step in range(2, 20):
                time.sleep(0.1)
                watchdog.report_step(step)


main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
