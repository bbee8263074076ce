"""The Prefect task around a registration; everything it does is in the pure modules."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifacts.artifact import Address, Artifact, Made, produce
from tasks.progress import Report, silent
from tasks.register.config import COPIED, LargeWeights, RegisterConfig
from tasks.register.gate import Decision
from tasks.register.model_registry import forget_if_gone, register_model
from tasks.register.promotion import write_decision
from tasks.tracking import TrackingStore


@task(name="register", cache_policy=NO_CACHE)
def register(
    address: Address,
    config: RegisterConfig,
    trained: Artifact,
    evaluated: Artifact,
    decision: Decision,
    store: TrackingStore,
    root: Path,
    run_id: str | None = None,
    large: LargeWeights = COPIED,
    report: Report = silent,
) -> Artifact:
    """The registration at `address` with what the gate says of it, made now, or found finished and
    still in the registry."""
    forget_if_gone(address, store)

    def make(out: Path) -> Made:
        made = register_model(
            *(config, trained, evaluated, store, root, out), run_id, report, large
        )
        version = int(made.counts["version"])
        files = write_decision(store, config.model_name, version, decision, out)
        return Made(made.counts, (*made.files, *files))

    return produce(address, make)
