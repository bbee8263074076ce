"""Other ways to start processes are refused before anything is begun where they cannot work."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from evaclip_model.errors import InputError
from tasks.download import config
from tasks.download.config import Crew, DownloadConfig
from tasks.download.download import download_images
from tests.tasks.download.faults import CONFIG, four_hosts, outcomes_of, rows_of, write_rows


@pytest.mark.parametrize("name", ["pyspark", "ray"])
def test_a_missing_package_is_named_and_nothing_is_begun(
    name: config.Distributor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "find_spec", lambda _: None)
    out = tmp_path / "out"
    with pytest.raises(InputError, match=f"needs the package {name}.*pip install {name}"):
        download_images(DownloadConfig(), tmp_path, out, Crew(1, 4, name), lambda *_: None)
    assert not out.exists()


def test_spark_needs_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "find_spec", lambda _: object())
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match="needs Java 17"):
        config.require_distributor("pyspark")
    monkeypatch.setenv("JAVA_HOME", "/usr/lib/jvm/some")
    config.require_distributor("pyspark")
    config.require_distributor("multiprocessing")


def test_ray_needs_a_cluster_as_its_own_would_listen_to_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(config, "find_spec", lambda _: object())
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InputError, match="needs a cluster, named by RAY_ADDRESS"):
        config.require_distributor("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    config.require_distributor("ray")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pyspark", "ray"])
def test_rows_end_the_same_whoever_starts_the_processes(
    name: config.Distributor, tmp_path: Path
) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    if name == "pyspark" and shutil.which("java") is None:
        pytest.skip("there is no Java")
    if name == "ray" and "RAY_ADDRESS" not in os.environ:
        pytest.skip("no Ray cluster is named: make test-ray")
    out = tmp_path / "out"
    out.mkdir()
    config = CONFIG.model_copy(update={"samples_per_shard": 16})
    with four_hosts() as webs:
        rows = write_rows(tmp_path / "merged", rows_of(webs["127.0.0.1"].port, 96, 1, 1))
        crew = Crew(processes=2, threads=8, distributor=name)
        made = download_images(config, tmp_path / "merged", out, crew, lambda *_: None)
    assert outcomes_of(out) == {uid: row.expected for uid, row in rows.items()}
    assert made.counts["rows"] == len(rows)
