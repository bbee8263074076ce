"""Whatever listens on this machine listens on loopback alone."""

from __future__ import annotations

import base64
import importlib.util
import os
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from flows.commands.run import temporary_server
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


def test_the_temporary_prefect_server_answers_this_command_alone(
    tmp_path: Path, monkeypatch
) -> None:
    for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING"):
        monkeypatch.delenv(name, raising=False)
    with listening_addresses() as seen, temporary_server(tmp_path):
        secret = base64.b64encode(os.environ["PREFECT_API_AUTH_STRING"].encode()).decode()
        foreign = {"Origin": "https://evil.example"}
        assert ask(foreign) == (401, None)
        assert ask({**foreign, "Authorization": f"Basic {secret}"}) == (200, None)
        time.sleep(1)
    assert "PREFECT_API_AUTH_STRING" not in os.environ
    assert seen
    assert seen <= LOOPBACK


def ask(headers: dict[str, str]) -> tuple[int, str | None]:
    """Status of a question to Prefect, and the origin whose pages may read the answer."""
    request = urllib.request.Request(f"{os.environ['PREFECT_API_URL']}/version", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.headers.get("Access-Control-Allow-Origin")
    except urllib.error.HTTPError as error:
        return error.code, error.headers.get("Access-Control-Allow-Origin")


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
