"""Rows that a run of many shards and steps makes in the databases of Prefect and MLflow."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tasks.lineage.mlflow_store import Tracking
from tasks.tracking import TrackingStore
from tests.flows import many_steps


def ask(database: Path, query: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(database) as opened:
        return opened.execute(query).fetchall()


def count_rows(database: Path) -> int:
    """Rows of all tables, but those that every new database of Prefect has."""
    tables = [
        name
        for (name,) in ask(
            database, "SELECT name FROM sqlite_master WHERE sql LIKE 'CREATE TABLE%'"
        )
    ]
    counted = [name for name in tables if not name.startswith("block_")]
    return sum(ask(database, f'SELECT count(*) FROM "{name}"')[0][0] for name in counted)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_of_200_000_shards_and_62_500_steps_makes_a_few_thousand_rows(tmp_path: Path) -> None:
    command = [sys.executable, many_steps.__file__, str(tmp_path)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    subprocess.run(command, env=env, check=True)
    mlflow, prefect = tmp_path / "mlflow.db", tmp_path / "prefect" / "prefect.db"
    store = TrackingStore.at(f"sqlite:///{mlflow}", "rows")
    Tracking(store, tmp_path / "tracking").close_killed()  # ships what was left on a busy machine
    assert count_rows(mlflow) < 5000
    assert count_rows(prefect) < 1000
    sent = "SELECT step FROM metrics WHERE key = '{}' AND value {} ORDER BY step"
    steps = [step for (step,) in ask(mlflow, sent.format("f0", "> 0"))]
    assert steps == [1, *range(625, 62_501, 625)]
    assert ask(mlflow, sent.format("spike", "> 0")) == [(many_steps.SPIKE,)]
    assert ask(mlflow, sent.format("rollbacks", "> 0"))[0] == (many_steps.ROLLED_BACK,)
    validated = [step for (step,) in ask(mlflow, sent.format("validation_loss", "> 0"))]
    assert validated[0] == 1000 and validated[-1] == 62_000 and len(validated) == 62
