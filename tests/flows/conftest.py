"""One small run of the whole pipeline, which many tests look at."""

from __future__ import annotations

import pytest

from tests.flows.command import Demo, Ended, run, small_demo


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Where the small demo is made, and with which settings."""
    return small_demo(tmp_path_factory.mktemp("demo") / "runs")


@pytest.fixture(scope="session")
def first_run(demo: Demo) -> Ended:
    """The first `python -m flows run pipeline demo` in that place."""
    ended = run(demo.arguments("run", "pipeline"), demo.root)
    assert ended.status == 0, f"{ended.output}\n{ended.errors}"
    return ended


@pytest.fixture(scope="session")
def finished(demo: Demo, first_run: Ended) -> Demo:
    """The small demo after its first run."""
    return demo
