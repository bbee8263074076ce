"""Backup and restore as docs/operating.md has them: the root copied at rest, lost, and copied back
under another path, where everything goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tasks.tracking import TrackingStore
from tests.infra.site import Site, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RUN_S = 240.0


def take_down_nothing(site: Site, file: Path) -> str:
    """A run of the smallest deployment, to its end; returns its id."""
    deployment = site.ask("deployments/name/takedown/takedown")["id"]
    body = {"parameters": {"file": str(file)}, "state": {"type": "SCHEDULED"}}
    run = str(site.ask(f"deployments/{deployment}/create_flow_run", body)["id"])
    assert site.until_over(run, RUN_S) == "COMPLETED"
    return run


def test_what_was_copied_goes_on_under_another_path(tmp_path: Path) -> None:
    root, backup, elsewhere = (tmp_path / name / "runs" for name in ("first", "backup", "second"))
    (tmp_path / "list.txt").write_text("http://127.0.0.1/none.jpg\n")
    with serving(root) as site:
        secret, before = site.secret, take_down_nothing(site, tmp_path / "list.txt")
        (deployment,) = (
            one for one in site.ask("deployments/filter", {}) if one["name"] == "train"
        )
        site.ask_mlflow("registered-models/create", {"name": "kept"})
    store = TrackingStore.at(f"sqlite:///{root}/mlflow.db", "e")
    store.client().create_model_version("kept", (root / "mlflow-artifacts").as_uri())

    shutil.copytree(root, backup, symlinks=True)
    shutil.rmtree(root)
    shutil.copytree(backup, elsewhere, symlinks=True)
    with serving(elsewhere) as site:
        assert site.secret == secret
        assert site.state(before) == "COMPLETED"
        assert site.ask("deployments/name/train/train")["id"] == deployment["id"]
        found = site.ask_mlflow("registered-models/get?name=kept")["registered_model"]
        assert [one["version"] for one in found["latest_versions"]] == ["1"]
        take_down_nothing(site, tmp_path / "list.txt")
    assert not root.exists(), "nothing went back to the old place"
