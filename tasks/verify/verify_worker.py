"""The process in which shards are verified: `python -m tasks.verify.verify_worker JOB.json`.

Covers: the job it is given, spreading shards over processes.
Not here: what is checked (verify_shard.py), who starts this and counts what is done (verify.py).

A process of its own, because decoding holds Python's lock for a good part of its time, and because
a pool started inside a flow would outlive the flow's being killed.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from evaclip_model.config import Config
from tasks.verify.config import VerifyConfig
from tasks.verify.verify_shard import Adopted, on_this_machine, verify_shard


class ShardJob(Config):
    """One shard to verify."""

    location: str
    """Path or URL."""
    size: int | None
    """Bytes that it should have; None if unknown."""
    path: str
    """Its path in the verdict."""
    target: Path
    """Where its table goes."""
    adopted: Adopted | None
    """Whose it is, if it was adopted."""


class VerifyJob(Config):
    """All shards of one call."""

    config: VerifyConfig
    shards: tuple[ShardJob, ...]
    processes: int


def main(job: VerifyJob) -> None:
    """Verify every shard of the job."""
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(job.processes, mp_context=context) as pool:
        for shard in as_completed(
            [pool.submit(_verify_one, job.config, one) for one in job.shards]
        ):
            shard.result()


def _verify_one(config: VerifyConfig, shard: ShardJob) -> None:
    with on_this_machine(shard.location, shard.target.parent) as tar:
        verify_shard(tar, shard.path, config, shard.target, shard.size, shard.adopted)


if __name__ == "__main__":
    where = Path(sys.argv[1])
    main(VerifyJob.from_mapping(json.loads(where.read_text()), where=str(where)))
