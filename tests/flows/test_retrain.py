"""Three weeks of scheduled retraining on a small web: first data, new data, bad data, none.

The model is tested on pictures that it is taught, so that half a minute of training shows.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import prefect.artifacts
import pyarrow.parquet as pq
import pytest
import webdataset
from prefect.testing.utilities import prefect_test_harness

from evaclip_model.errors import InputError
from evaclip_model.ports import find_free_port
from flows.audit.sample_trace import take_down, trace_sample
from flows.commands.recipes import FLOWS
from flows.graph.graph import load_graph
from flows.graph.incremental import News, describe_new_data, find_new_data
from flows.pipeline import pipeline, retrain
from tasks.artifacts.artifact import Artifact, read_artifacts
from tasks.demo.demo import Concept, read_concepts, read_drawings
from tasks.register.promotion import champion_of, history, read_decision, roll_back
from tasks.tracking import TrackingStore
from tests.flows.command import run, started
from tests.tasks.demo.plan_metadata import DemoRow, write_metadata

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

FIRST, SECOND = 48, 24
"""Concepts of the first week and of the second."""
ROTTED, KNOWN = 8, 10
"""Rows of the second week whose pictures are gone, and that the first week had already."""
SECONDS_OF_NOTHING = 60.0

SMALL = {
    "embed_dim": 64,
    "vision": {
        **{"image_px": 32, "patch_px": 8, "width": 64, "layers": 2, "heads": 2, "mlp_width": 128},
        **{"mlp": "swiglu", "fused_qkv": False, "sub_norm": True, "norm_placement": "pre"},
        "rope_reference_grid": 4,
    },
    "text": {"context_length": 16, "vocab_size": 49408, "width": 64, "layers": 1, "heads": 2},
}
"""An EVA-02-CLIP that learns a hundred pictures by heart in seconds."""

RECIPE = """
name = "weekly"
title = "Retraining in small"

[demo]
port = {port}

[merge]
rows_per_file = 64
memory_limit = "500MB"

[[merge.sources]]
name = "laion2b"
files = "{folder}/metadata/*/*.parquet"
own_rows = true
columns = "laion"

[download]
samples_per_shard = 64
image_px = 64
deadline_s = 5
timeout_s = 5
retries = 0
passes = 1
allowed_networks = ["127.0.0.1/32"]
min_success_rate = 0.5

[verify]

[dataset]
exact_duplicates = "keep"   # the bad week's pictures are known ones under other names
takedowns = ["{folder}/takedowns.txt"]

[initialise]
model = "{folder}/small.json"

[[train]]
name = "only"
image_px = 32
samples_seen = 9_600
global_batch = 48
optimizer = "adamw"
lr_vision = 2e-3
lr_text = 2e-3
layer_decay_vision = 1.0
layer_decay_text = 1.0
schedule = "constant"
warmup_steps = 10
patch_dropout = 0.0
crop_scale = [1.0, 1.0]
checkpoint_every_steps = 20

[retrain]
samples_seen = 4_800
lr_scale = 0.7

[evaluate]

[[evaluate.sets]]
name = "taught"
kind = "classification"
folder = "{folder}/taught"

[register]
model_name = "weekly"
"""


@dataclass(frozen=True)
class Web:
    """The metadata that has been published so far, and where everything is made."""

    folder: Path
    port: int
    concepts: tuple[Concept, ...]

    @property
    def root(self) -> Path:
        return self.folder / "runs"

    @property
    def recipe(self) -> str:
        return str(self.folder / "weekly.toml")

    @property
    def store(self) -> TrackingStore:
        return TrackingStore.at(f"sqlite:///{self.root}/mlflow.db", "weekly")

    def row(self, concept: Concept, route: str = "img", copy: str = "") -> DemoRow:
        url = f"http://127.0.0.1:{self.port}/{route}/noto/{concept.key}.webp{copy}"
        return DemoRow(concept, url, concept.name, similarity=0.3)

    def publish(self, week: str, rows: Sequence[DemoRow]) -> None:
        write_metadata("laion2b", rows, self.folder / "metadata" / week)

    def made(self, kind: str) -> list[Artifact]:
        return [artifact for artifact in read_artifacts(self.root) if artifact.kind == kind]

    def champion(self) -> int | None:
        found = champion_of(self.store, "weekly", "champion")
        return found and found.version

    def news(self) -> News:
        recipe, _, graph = load_graph(self.recipe, ())
        return find_new_data(recipe, graph, self.store, keep_rejected=False)

    def said(self) -> str:
        recipe, _, _ = load_graph(self.recipe, ())
        return "\n".join(describe_new_data(self.news(), recipe))


def make_web(folder: Path) -> Web:
    """An empty web with its recipe."""
    named = {concept.name: concept for concept in read_concepts()}
    concepts = tuple(named[name] for name in sorted(named))[: FIRST + SECOND]
    made = Web(folder, find_free_port(), concepts)
    (folder / "weekly.toml").write_text(RECIPE.format(port=made.port, folder=folder))
    (folder / "small.json").write_text(json.dumps(SMALL))
    (folder / "takedowns.txt").write_text("# nobody asked yet\n")
    write_taught(folder / "taught", concepts)
    return made


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    """An empty web, and a Prefect server for the length of the module."""
    made = make_web(tmp_path_factory.mktemp("weekly"))
    with prefect_of(made):
        yield made


@contextmanager
def prefect_of(web: Web) -> Iterator[None]:
    """A Prefect server for what is run on a web in this process, and one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})  # a thread that waits for another one's core waits long
    try:
        # the server first: whatever has this root in its environment is killed with the second week
        with (
            prefect_test_harness(server_startup_timeout=120),
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setenv("EVACLIP_ROOT", str(web.root))
            yield
    finally:
        os.sched_setaffinity(0, cores)


def write_taught(folder: Path, concepts: Sequence[Concept]) -> None:
    """An evaluation set of the very pictures, in the published layout."""
    drawings = read_drawings("noto")
    (folder / "test").mkdir(parents=True)
    (folder / "classnames.txt").write_text("".join(f"{one.name}\n" for one in concepts))
    (folder / "zeroshot_classification_templates.txt").write_text("{c}\n")
    (folder / "test" / "nshards.txt").write_text("1\n")
    with webdataset.TarWriter(str(folder / "test" / "0.tar")) as tar:
        for number, concept in enumerate(concepts):
            tar.write(
                {"__key__": f"s{number:07d}", "webp": drawings[concept.key], "cls": str(number)}
            )


def top1(web: Web) -> dict[str, float]:
    results = json.loads((web.made("evaluate")[-1].folder / "results.json").read_text())
    return {name: figures["top1"] for name, figures in results["results"]["taught"].items()}


def test_week_1_the_first_data_makes_the_first_champion(web: Web) -> None:
    web.publish("1", [web.row(concept) for concept in web.concepts[:FIRST]])
    assert web.news().last is None
    registered = retrain(recipe=web.recipe)
    assert registered is not None
    assert read_decision(registered.folder).summary == "PROMOTE: no champion yet"
    assert web.champion() == 1
    (download,) = web.made("download")
    assert download.counts["samples"] == FIRST
    assert top1(web)["trained"] > 0.2
    assert "nothing new" in web.said()


def test_week_2_only_what_is_new_is_fetched_and_the_gate_promotes(web: Web) -> None:
    new = web.concepts[FIRST:]
    gone = [web.row(concept, "gone", "?again") for concept in web.concepts[:ROTTED]]
    known = [web.row(concept) for concept in web.concepts[:KNOWN]]
    web.publish("2", [*map(web.row, new), *gone, *known])
    taken_down = web.row(web.concepts[0]).url
    (web.folder / "takedowns.txt").write_text(f"{taken_down}\n")
    shards = {path: path.stat().st_mtime_ns for path in web.root.glob("download/*/shards/*.tar")}

    kill_while_training(web)
    before_resume = [artifact.digest for artifact in web.made("download")]
    registered = retrain(recipe=web.recipe)
    assert registered is not None

    assert [artifact.digest for artifact in web.made("download")] == before_resume
    second = web.made("download")[1]
    assert second.counts["rows"] == SECOND + ROTTED
    assert second.counts["failed.not_found"] == ROTTED
    assert web.made("merge")[1].counts["dropped.given_before"] == KNOWN
    assert {p: p.stat().st_mtime_ns for p in shards} == shards
    dataset = web.made("dataset")[-1]
    assert dataset.counts["samples"] == FIRST + SECOND - 1, "all that is stored, less the takedown"
    assert dataset.counts["left_out.takedown"] == 1

    trained = web.made("train")
    assert trained[-1].parents["start_from"] == trained[0].digest
    decision = read_decision(registered.folder)
    assert (decision.outcome, decision.champion) == ("promote", 1), decision.summary
    assert web.champion() == 2
    assert [(m.version, m.how) for m in history(web.store, "weekly", "champion")] == [
        (1, "gate"),
        (2, "gate"),
    ]
    assert top1(web)["trained"] > top1(web)["champion"]
    assert "nothing new" in web.said()

    page = summary_page()
    assert decision.summary in page
    of_both_weeks = FIRST + SECOND + ROTTED + KNOWN, FIRST + SECOND + ROTTED, FIRST + SECOND
    assert f"| laion2b | {' | '.join(map(str, of_both_weeks))} | {FIRST + SECOND - 1} |" in page


def summary_page() -> str:
    """The newest page for whoever pays for it."""
    found = prefect.artifacts.Artifact.get("summary")
    assert found is not None
    return str(found.data)


def kill_while_training(web: Web) -> None:
    """The same command, killed -9 in the middle of training."""
    before = set(web.root.glob("train/*/metrics.jsonl"))
    with started(["run", "retrain", web.recipe], web.root) as process:
        deadline = time.monotonic() + 300
        while not set(web.root.glob("train/*/metrics.jsonl")) - before:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    assert len(web.made("train")) == len(before)


def test_week_3_bad_data_is_rejected_and_the_champion_stays(web: Web) -> None:
    draw = random.Random(3)
    rows = []
    for copy in range(3):
        names = [concept.name for concept in web.concepts]
        draw.shuffle(names)
        rows += [
            replace(web.row(concept, copy=f"?bad={copy}"), caption=name)
            for concept, name in zip(web.concepts, names, strict=True)
        ]
    web.publish("3", rows)
    trainings = len(web.made("train"))
    large = "global_batch=480", "warmup_steps=5", "checkpoint_every_steps=10"
    with pytest.raises(InputError, match=r"global_batch = 480, but there are \d+ samples"):
        retrain(recipe=web.recipe, overrides=[f"train.only.{one}" for one in large])
    assert len(web.made("train")) == trainings
    registered = retrain(recipe=web.recipe)
    assert registered is not None
    decision = read_decision(registered.folder)
    assert (decision.outcome, decision.champion) == ("reject", 2), decision.summary
    assert web.champion() == 2
    version = web.store.client().get_model_version("weekly", "3")
    assert version.tags["evaclip.gate"] == "reject"
    assert "challenger" in version.aliases


def test_then_there_is_nothing_new_and_it_ends_in_seconds(web: Web) -> None:
    artifacts = [artifact.digest for artifact in read_artifacts(web.root)]
    ended = run(["run", "retrain", web.recipe], web.root)
    assert ended.status == 0, ended.errors
    assert "nothing new: all 6 files were merged or adopted before" in ended.output
    assert "set aside   data of weekly/3, which was rejected" in ended.output
    assert ended.seconds < SECONDS_OF_NOTHING
    started_at = time.monotonic()
    assert retrain(recipe=web.recipe) is None
    assert time.monotonic() - started_at < SECONDS_OF_NOTHING
    assert [artifact.digest for artifact in read_artifacts(web.root)] == artifacts
    assert "retrain" in FLOWS


def test_the_next_week_leaves_the_bad_weeks_data_aside(web: Web) -> None:
    web.publish("4", [web.row(web.concepts[0], copy="?week=4")])
    news = web.news()
    assert {source: len(files) for source, files in news.files.items()} == {"laion2b": 2}
    held = {part.digest for part in news.used}
    assert held == {part.digest for part in web.made("verify")[:2]}
    rows = pq.read_metadata(sorted((web.folder / "metadata" / "4").glob("*"))[0]).num_rows
    assert rows == 1
    for path in (web.folder / "metadata" / "4").glob("*"):
        path.unlink()


def test_the_lineage_of_the_champion_is_a_tree_over_both_weeks(web: Web) -> None:
    ended = run(["lineage", "models:/weekly@champion"], web.root)
    assert ended.status == 0, ended.errors
    tree = ended.output
    print(tree)
    for kind in ("merge", "download", "verify", "join", "dataset", "train"):
        for artifact in web.made(kind)[:2] if kind != "join" else web.made(kind)[:1]:
            assert artifact.digest[:8] in tree, (kind, tree)


def test_a_sample_is_traced_and_taken_down_through_every_weeks_version(
    web: Web, tmp_path: Path
) -> None:
    first, second = web.made("dataset")[:2]
    (found,) = trace_sample(root=web.root, url=web.row(web.concepts[0]).url)
    reasons = {version.digest: version.left_out for version in found.versions}
    assert (reasons[first.digest], reasons[second.digest]) == (None, "takedown")

    url = web.row(web.concepts[FIRST]).url  # came in the second week
    assert url is not None
    (found,) = trace_sample(root=web.root, url=url)
    assert first.digest not in {version.digest for version in found.versions}
    held = {version.digest: version for version in found.versions}[second.digest]
    assert [str(one) for model in held.models for one in model.registered][:1] == ["weekly/2"]

    copy = tmp_path / "runs"
    shutil.copytree(web.root, copy, ignore=shutil.ignore_patterns("prefect", "mlflow*", "cache"))
    (tmp_path / "list.txt").write_text(f"{url}\n")
    replaced = {one.old.digest: one.new for one in take_down(tmp_path / "list.txt", copy)}
    assert first.digest not in replaced
    assert replaced[second.digest].counts["left_out.takedown"] == 2
    assert replaced[second.digest].counts["samples"] == FIRST + SECOND - 2


def test_a_rollback_gives_the_alias_back_and_sets_that_data_aside(web: Web) -> None:
    ended = run(["rollback", "weekly", "--reason", "a look at it"], web.root)
    assert ended.status == 0, ended.errors
    assert ended.output.startswith("weekly@champion: version 2 -> 1")
    assert web.champion() == 1
    assert "data of weekly/2, which was rolled back" in web.said()
    forced = run(["promote", "weekly/3", "--force", "--reason", "to see"], web.root)
    assert forced.status == 0, forced.errors
    assert web.champion() == 3
    assert history(web.store, "weekly", "champion")[-1].how == "force"
    refused = run(["promote", "weekly/3", "--force"], web.root)
    assert refused.status == 2 and "--reason" in refused.errors
    roll_back(web.store, "weekly", "champion", 2, "me", "done looking")


def test_a_worse_model_of_the_whole_pipeline_is_compared_with_the_champion_and_rejected(
    web: Web,
) -> None:
    files = web.folder / "metadata" / "1" / "*.parquet"
    small = ("train.only.samples_seen=480", "train.only.global_batch=32")  # 47 samples are left
    changes = (f"merge.sources.laion2b.files={files}", *small)
    pipeline(recipe=web.recipe, overrides=changes)
    decision = read_decision(web.made("register")[-1].folder)
    assert (decision.outcome, decision.champion) == ("reject", 2), decision.summary
    assert web.champion() == 2
    assert set(top1(web)) == {"trained", "champion"}
