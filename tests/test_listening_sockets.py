"""Whatever listens on this machine listens on loopback alone."""

from __future__ import annotations

import importlib.util
import shutil
import time
from pathlib import Path

import pytest

from flows.graph.ephemeral_server import temporary_server
from tests.listening import LOOPBACK, listening_addresses
from tests.tasks.train.conftest import data  # noqa: F401 (a fixture)
from tests.tasks.train.stage import train


def test_ranks_of_a_training_on_one_machine_meet_where_nobody_else_comes(
    data: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    with listening_addresses() as seen:
        train(data, tmp_path, {"ranks": 2}, samples_seen=12 * 20)
    assert seen <= LOOPBACK


def test_a_single_rank_opens_no_socket(data: Path, tmp_path: Path) -> None:  # noqa: F811
    with listening_addresses() as seen:
        train(data, tmp_path, {"ranks": 1}, samples_seen=12 * 20)
    assert seen <= LOOPBACK


def test_the_temporary_prefect_server_is_on_loopback(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with listening_addresses() as seen, temporary_server(tmp_path):
        time.sleep(1)
    assert seen
    assert seen <= LOOPBACK


@pytest.mark.skipif(
    importlib.util.find_spec("pyspark") is None or shutil.which("java") is None,
    reason="Spark and Java are not installed",
)
def test_a_spark_session_without_a_cluster_is_on_loopback(monkeypatch) -> None:
    from tasks.spark_session import spark_builder

    for name in ("PYSPARK_SUBMIT_ARGS", "MASTER", "SPARK_CONF_DIR"):
        monkeypatch.delenv(name, raising=False)
    with listening_addresses() as seen:
        session = spark_builder("test", 1).getOrCreate()
        assert session.range(10).count() == 10
        session.stop()
    assert seen
    assert seen <= LOOPBACK
