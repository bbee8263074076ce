"""Other ways to start processes are refused before anything is begun where they cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaclip_model.errors import InputError
from tasks.download import spread
from tasks.download.config import DownloadConfig
from tasks.download.download import Crew, download_images


@pytest.mark.parametrize("name", ["pyspark", "ray"])
def test_a_missing_package_is_named_and_nothing_is_begun(
    name: spread.Distributor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spread, "find_spec", lambda _: None)
    out = tmp_path / "out"
    with pytest.raises(InputError, match=f"needs the package {name}.*pip install {name}"):
        download_images(DownloadConfig(), tmp_path, out, Crew(1, 4, name), lambda *_: None)
    assert not out.exists()


def test_spark_needs_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "find_spec", lambda _: object())
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match="needs Java 17"):
        spread.require_distributor("pyspark")
    monkeypatch.setenv("JAVA_HOME", "/usr/lib/jvm/some")
    spread.require_distributor("pyspark")
    spread.require_distributor("multiprocessing")
