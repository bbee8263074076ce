"""A run that ends after one step, which is thrown away: does it fit, does it work, how long is it.

Covers: the self-test, one gradient, and a report of them.
Not here: estimates without running anything (cost.py).
"""

from __future__ import annotations

import resource
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import torch

from evaclip_model.training.config import DRY_RUN_FILE, TrainJob
from evaclip_model.training.monitoring.rank_stats import from_all
from evaclip_model.training.rank import Laps, Rank
from evaclip_model.training.stage_outputs import write_json


def dry_run(job: TrainJob) -> Mapping[str, Any]:
    """Compute the gradient of the first batch, forget it, and write `dry_run.json`.

    Every rank calls it. Nothing else is written, and no checkpoint is read. On a GPU the first step
    takes longer than those after it.

    Returns:
        What the file says: seconds of each part, most memory of any rank in bytes (on a GPU that of
        tensors, else of the process), loss, gradient norm, the self-test's differences.
    """
    rank = Rank(job, should_stop=lambda: False)
    laps = Laps()
    with closing(rank.reader.batches(0, 1)) as batches:
        gradient = rank.gradient(next(batches), 0, laps, save_failed=False)
    rank.engine.discard()
    rank.reader.close()
    result = {
        "ranks": rank.ranks,
        "device": str(rank.device),
        "micro_batch": rank.part_size or job.train.global_batch // rank.ranks,
        "data_wait_s": gradient.waited_s,
        "prepare_s": gradient.prepared_s,
        "gradient_s": gradient.computed_s,
        "memory_peak_bytes": max(from_all(_memory_peak(rank.device))),
        "loss": gradient.together.mean("loss"),
        "grad_norm": gradient.norms["total"],
        "self_test": rank.tested.as_json(),
    }
    if rank.number == 0:
        write_json(job.run_dir / DRY_RUN_FILE, result)
    return result


def _memory_peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
