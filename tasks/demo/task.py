"""The demo stage as a Prefect task."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifact import Artifact, produce
from tasks.demo.config import DemoConfig
from tasks.demo.world import address, make_demo
from tasks.progress import Report, silent


@task(name="demo", cache_policy=NO_CACHE)
def demo(root: Path, config: DemoConfig, report: Report = silent) -> Artifact:
    """Return the demo's world, made if it is not there."""
    return produce(address(root, config), lambda out: make_demo(config, out, report))
