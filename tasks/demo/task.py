"""The Prefect task around the demo's world; everything it does is in the pure modules."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifacts.artifact import Address, Artifact, produce
from tasks.demo.config import DemoConfig
from tasks.demo.world import make_demo
from tasks.progress import Report


@task(name="demo", cache_policy=NO_CACHE)
def demo(address: Address, config: DemoConfig, report: Report) -> Artifact:
    """The demo's world at `address`, made now or found finished."""
    return produce(address, lambda out: make_demo(config, out, report))
