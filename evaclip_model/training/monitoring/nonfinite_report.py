"""A report of a step whose figures are not numbers: which samples of which rank.

Covers: naming rank, shard and sample; a file with the samples of such a step.
Not here: the verdict on the step (spike_guard.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from evaclip_model.reading.reader import Batch
from evaclip_model.training.stage_outputs import write_json

NAMED = 3
"""Samples that a sentence names at most."""


def describe_samples(rank: int, batch: Batch, finite_rows: Tensor) -> dict[str, Any]:
    """A rank's samples of a step, in JSON's types.

    Args:
        finite_rows: [b] whether the features of each are numbers.
    """
    samples = [
        {"position": position, "shard": origin.shard, "key": origin.key, "finite": bool(finite)}
        | {"caption": caption}
        for position, origin, caption, finite in zip(
            batch.positions.tolist(),
            batch.origins,
            batch.captions,
            finite_rows.tolist(),
            strict=True,
        )
    ]
    return {"rank": rank, "samples": samples}


def name_culprits(ranks: Sequence[dict[str, Any]]) -> str:
    """Rank, sample and shard of the features that are not finite; empty when all are."""
    bad: list[str] = []
    for rank in ranks:
        samples = [sample for sample in rank["samples"] if not sample["finite"]]
        if samples and len(samples) == len(rank["samples"]):
            bad.append(f"rank {rank['rank']}, all its samples")
            continue
        bad += [f"rank {rank['rank']}, sample {one['key']} of {one['shard']}" for one in samples]
    more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    return "; ".join(bad[:NAMED]) + more


def write_dump(run_dir: Path, step: int, figures: dict[str, Any]) -> Path:
    """Write `nonfinite-STEP.json`, beside its place first."""
    path = run_dir / f"nonfinite-{step:08d}.json"
    write_json(path, figures)
    return path
