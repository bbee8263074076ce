"""Recipes of what exists already: what they may leave out; one from shards to a trained model."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from evaclip_model.errors import InputError
from evaclip_model.reading.samples import ShardManifest, read_tombstones, skip_tombstones
from flows.audit.sample_trace import take_down, trace_sample
from flows.config.profile import Profile
from flows.config.recipe import Recipe, load_recipe
from flows.graph.ancestry import data_trees
from flows.graph.graph import Graph, draw_graph
from flows.graph.step import Step
from tasks.artifacts.artifact import Artifact
from tasks.index.sample_index import SampleIndex
from tasks.progress import report_nothing
from tests.flows.command import run
from tests.tasks.adopt.test_adopt import IMG2DATASET, digests, pack, stranger, web, write_pictures

__all__ = ["web"]

RECIPE = """
name = "mine"
title = "What I have"

[[adopt.sources]]
name = "shards"
files = "{folder}/shards"

[[adopt.sources]]
name = "photos"
files = "{folder}/photos"

[initialise]
model = "EVA02-CLIP-demo"
image_px = 32

[[train]]
name = "tune"
image_px = 32
global_batch = 32
samples_seen = 64
warmup_steps = 1
lanes = 8
patch_dropout = 0.5
source_weights = {{ shards = 0.7, photos = 0.3 }}
"""


@dataclass(frozen=True)
class Mine:
    """A recipe of two adopted sources, and what lies where it points."""

    folder: Path

    @property
    def recipe(self) -> str:
        return str(self.folder / "mine.toml")

    @property
    def root(self) -> Path:
        return self.folder / "runs"


def write_mine(folder: Path) -> Mine:
    """80 samples in two shards of one name, one more without a caption; 12 photos, 10 of them with
    captions and there."""
    pack(folder / "shards/a/0.tar", [*map(stranger, range(40)), stranger(99, txt=None)])
    pack(folder / "shards/b/0.tar", [stranger(n) for n in range(100, 140)])
    write_pictures(folder / "photos", range(200, 211))
    lines = [f"{number}.jpg,photo {number}" for number in range(200, 212)]
    lines[3] = "203.jpg,"
    (folder / "photos/captions.csv").write_text("image,caption\n" + "\n".join(lines) + "\n")
    (folder / "mine.toml").write_text(RECIPE.format(folder=folder))
    return Mine(folder)


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Mine:
    """Nothing of it is made yet."""
    return write_mine(tmp_path_factory.mktemp("mine"))


def graph_of(recipe: Recipe) -> Graph:
    return draw_graph(recipe, Path("/nowhere"), "sqlite:///none")


def stages(graph: Graph) -> list[str]:
    return [step.stage.name for step in graph.steps]


def test_a_recipe_of_adopted_sources_needs_no_metadata_and_no_evaluation(mine: Mine) -> None:
    graph = graph_of(load_recipe(mine.recipe))
    assert stages(graph) == ["adopt", "verify", "dataset", "initialise", "train"]
    for flow in ("prepare", "train"):
        graph.require_runnable(flow)
    with pytest.raises(InputError, match=r"the recipe has no \[evaluate\] table: add one"):
        graph.require_runnable("pipeline")


CAPTIONS = "captions=[{name = 'de', files = '/nowhere/*.jsonl', source = '%s'}]"


@pytest.mark.parametrize(
    ("source", "weights", "said"),
    [
        ("shards", "", "no training stage draws captions 'de': set train.caption_weights"),
        ("shards", "{ fr = 1 }", "caption_weights names 'fr', which is none of the captions"),
        ("others", "{ de = 1 }", "captions 'de' .*'others', which is none of"),
    ],
)
def test_captions_that_nothing_draws_or_nobody_has_are_refused(
    mine: Mine, source: str, weights: str, said: str
) -> None:
    drawn = [f"train.tune.caption_weights={weights}"] if weights else []
    with pytest.raises(InputError, match=said):
        load_recipe(mine.recipe, [CAPTIONS % source, *drawn])


def test_captions_that_are_not_here_are_absent_and_change_the_dataset_alone(mine: Mine) -> None:
    before = graph_of(load_recipe(mine.recipe))
    drawn = "train.tune.caption_weights={ stored = 1, de = 1 }"
    after = graph_of(load_recipe(mine.recipe, [CAPTIONS % "shards", drawn]))
    assert "no file matches '/nowhere/*.jsonl'" in after.dataset.absent[0]
    changed = [
        a.stage.name for a, b in zip(after.steps, before.steps, strict=True) if a.digest != b.digest
    ]
    assert changed == ["dataset", "train"]


def test_metadata_and_adopted_sources_are_joined_and_weighted_together(tmp_path: Path) -> None:
    write_mine(tmp_path)
    source = f"[{{name = 'mine', files = '{tmp_path}/shards'}}]"
    weights = "train.stage1.source_weights={laion2b = 0.5, coyo700m = 0.1, mine = 0.4}"
    graph = graph_of(load_recipe("demo", [f"adopt.sources={source}", weights]))
    assert stages(graph)[:7] == [
        *("demo", "merge", "download", "verify", "adopt", "verify", "join")
    ]
    joined = graph.dataset.inputs["verify"]
    assert isinstance(joined, Step)
    assert joined.stage.name == "join"
    alone = graph_of(load_recipe("demo"))
    assert [step.digest for step in alone.data_steps[:4]] == [
        step.digest for step in graph.data_steps[:4]
    ]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["download="], r"\[merge\] and \[download\] belong together"),
        (["merge=", "download="], r"there is no data: give \[merge\] with \[download\], or \[\["),
        (["evaluate="], r"\[register\] needs \[evaluate\]"),
        (["train.stage1.validation.every_steps=5"], r"dataset.validation_share holds nothing out"),
        (["train.stage1.samples_seen=1280"], r"has 10 steps .*, fewer than warmup_steps = 40"),
        (
            ["train.stage2.global_batch=8192", "train.stage2.warmup_steps=1"],
            r"global_batch = 8,192, but .* at most 4,000 samples",
        ),
        (["adopt.sources=[{name='laion2b', files='x'}]"], "two sources are named 'laion2b'"),
        (
            ["train.stage1.checkpoints={keep_every_steps = 701}"],
            r"'stage1' has 700 steps .* fewer than checkpoints.keep_every_steps = 701",
        ),
        (
            ["train.stage1.checkpoint_every_steps=701"],
            r"fewer than checkpoint_every_steps = 701: set it to at most 700, or leave it out",
        ),
        (
            [
                *("train.stage2.samples_seen=5_120", "train.stage2.warmup_steps=0"),
                "train.1.checkpoint_every_steps=60",
            ],
            r"'stage2' has 40 steps .* checkpoint_every_steps = 60: set it to at most 40",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_fetched_or_adopted(
    changes: list[str], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        load_recipe("demo", changes)


def test_a_checkpoint_interval_of_before_the_training_was_shortened_holds(tmp_path: Path) -> None:
    short = ["train.stage2.samples_seen=5_120", "train.stage2.warmup_steps=0"]
    every = "train.stage1.checkpoint_every_steps=100_000"
    stage = load_recipe("demo", short).train[1]
    assert stage.steps < stage.checkpoint_every_steps
    assert load_recipe("demo", ["train.stage1.epochs=2", every]).train[0].epochs == 2
    mine = write_mine(tmp_path)
    assert load_recipe(mine.recipe).train[0].checkpoint_every_steps == 500, "the default is no wish"
    longer = Path(mine.recipe).read_text() + "checkpoint_every_steps = 3\n"
    Path(mine.recipe).write_text(longer)
    with pytest.raises(InputError, match=r"mine.toml: .*'tune' has 2 steps .* or leave it out"):
        load_recipe(mine.recipe)
    own = "[[train]]\nname = 'tune'\nsamples_seen = 32\n"
    (tmp_path / "own.toml").write_text(f"include = ['mine.toml']\nname = 'own'\n{own}")
    assert load_recipe(str(tmp_path / "own.toml")).train[0].steps == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["train.tune.global_batch=88"], None),
        (["train.tune.global_batch=96"], "global_batch = 96, but there are at most 91 samples of"),
        (["train.tune.lanes=16"], "reads 16 lanes, but source 'photos' has at most 11 samples"),
        (
            ["train.tune.global_batch=96", "train.tune.source_weights={shards=1}"],
            "global_batch = 96, but there are at most 80 samples of shards: set it lower, or add",
        ),
    ],
)
def test_a_batch_larger_than_what_lies_there_is_refused_before_it_is_adopted(
    tmp_path: Path, changes: list[str], sentence: str | None
) -> None:
    mine = write_mine(tmp_path)
    changes = [*changes, "train.tune.samples_seen=96"]
    if sentence is None:
        draw_graph(load_recipe(mine.recipe, changes), mine.root, "sqlite:///none").require_samples()
        return
    sets = [part for one in changes for part in ("--set", one)]
    refused = run(["run", "prepare", mine.recipe, *sets], mine.root)
    assert refused.status == 2
    assert sentence in refused.errors.replace("\n", " ")
    assert not (mine.root / "adopt").exists()
    planned = run(["plan", mine.recipe, *sets], mine.root)
    assert sentence in planned.output.replace("\n", " ")


def test_what_is_not_there_is_not_counted(tmp_path: Path) -> None:
    mine = write_mine(tmp_path)
    planned = run(["plan", mine.recipe, "--set", "adopt.sources.photos.files=gone/"], mine.root)
    assert "no file matches 'gone/'" in planned.output.replace("\n", " ")
    assert "at most 0 samples" not in planned.output.replace("\n", " ")


def test_what_adoption_alone_could_tell_is_refused_before_anything_is_made_of_it(
    tmp_path: Path,
) -> None:
    mine = write_mine(tmp_path)
    few = ["train.tune.lanes=11", "train.tune.global_batch=33"]
    graph = draw_graph(load_recipe(mine.recipe, few), mine.root, "sqlite:///none")
    graph.require_samples()
    graph.data_steps[0].make_artifact(Profile(root=mine.root), report_nothing)
    with pytest.raises(InputError, match=r"11 lanes, but source 'photos' has at most 10 samples"):
        graph.require_samples()


@pytest.fixture(scope="module")
def trained(mine: Mine) -> dict[str, Artifact]:
    """Kind -> artifact, after every step of the recipe, without a flow around them."""
    profile = Profile(root=mine.root)
    graph = draw_graph(load_recipe(mine.recipe), mine.root, "sqlite:///none")
    return {step.stage.name: step.make_artifact(profile, report_nothing) for step in graph.steps}


def test_what_is_adopted_is_counted_and_trained_on(trained: dict[str, Artifact]) -> None:
    counts = trained["dataset"].counts
    assert (counts["samples"], counts["shards.samples"], counts["photos.samples"]) == (90, 80, 10)
    reasons = {name: n for name, n in counts.items() if name.startswith("left_out.")}
    assert reasons == {
        "left_out.bad.no_caption": 1,
        "left_out.no_caption": 1,
        "left_out.missing_file": 1,
    }
    assert trained["train"].counts["samples_seen"] == 64
    assert "| photos |" in (trained["dataset"].folder / "card.md").read_text()


def test_an_adopted_source_leads_down_to_what_was_trained_on_it(
    mine: Mine, trained: dict[str, Artifact]
) -> None:
    down = "\n".join(data_trees(Profile(root=mine.root), "photos"))
    for kind in ("adopt", "verify", "dataset", "train"):
        assert trained[kind].digest in down
    with pytest.raises(InputError, match="nor one of its sources; those are: photos, shards"):
        [*data_trees(Profile(root=mine.root), "others")]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ([], None),
        (["global_batch=96"], "global_batch = 96, but there are 90 samples of shards, photos"),
        (["lanes=16"], "reads 16 lanes, but source 'photos' has 10 samples"),
    ],
)
def test_a_training_that_wants_more_than_there_is_is_refused_before_any_of_it_begins(
    mine: Mine, trained: dict[str, Artifact], changes: list[str], sentence: str | None
) -> None:
    recipe = load_recipe(mine.recipe, [f"train.tune.{change}" for change in changes])
    graph = draw_graph(recipe, mine.root, "sqlite:///none")
    assert graph.dataset.digest == trained["dataset"].digest
    if sentence is None:
        graph.require_samples()
    else:
        with pytest.raises(InputError, match=sentence):
            graph.require_samples()


def test_an_adopted_sample_is_traced_and_taken_down_and_its_shard_is_not_touched(
    mine: Mine, trained: dict[str, Artifact]
) -> None:
    before = digests(mine.folder / "shards")
    index = SampleIndex(trained["verify"].folder)
    row = next(index.iterate_chunks("uid", "key")).slice(7, 1).to_pylist()[0]
    [found] = trace_sample(root=mine.root, uid=row["uid"])
    assert (found.shard, found.row["key"]) == (f"{mine.folder}/shards/a/0.tar", row["key"])
    assert [one.kind for one in found.made_by] == ["adopt", "verify"]
    assert [model.name for model in found.versions[0].models] == ["tune"]
    (mine.folder / "list.txt").write_text(row["uid"])
    [done] = take_down(mine.folder / "list.txt", mine.root)
    assert done.new.counts["samples"] == 89
    manifest = ShardManifest.read(done.new.folder / "shards.json")
    [shard] = [one for one in manifest.shards if one.path.endswith("shards/a/0.tar")]
    left_out = read_tombstones(str(done.new.folder), shard)
    assert left_out == {7, 40}
    read = webdataset.WebDataset(str(done.new.folder / shard.path), shardshuffle=False)
    keys = [sample["__key__"] for sample in skip_tombstones(read, left_out)]
    assert len(keys) == 39
    assert row["key"] not in keys
    assert digests(mine.folder / "shards") == before


MAKE_STEPS = """
import sys
from pathlib import Path
from flows.config.profile import Profile
from flows.config.recipe import load_recipe
from flows.graph.graph import draw_graph
from tasks.progress import report_nothing
root = Path(sys.argv[2])
profile = Profile(root=root, ranks=1, train_engine="torch")
for step in draw_graph(load_recipe(sys.argv[1]), root, "sqlite:///none").steps:
    step.make_artifact(profile, report_nothing)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_shards_of_plain_img2dataset_are_trained_on_traced_and_taken_down_without_a_byte_written(
    tmp_path: Path, web: str
) -> None:
    write_pictures(tmp_path / "web", range(30))
    urls = [f"{web}/{number}.jpg" for number in range(30)]
    table = pa.table({"URL": urls, "TEXT": [f"noise {n}" for n in range(30)]})
    pq.write_table(table, tmp_path / "list.parquet")
    command = [sys.executable, "-c", IMG2DATASET, tmp_path / "list.parquet", tmp_path / "shards"]
    subprocess.run(command, check=True, capture_output=True)
    pack(tmp_path / "photos/0.tar", [stranger(n) for n in range(100, 120)])
    (tmp_path / "mine.toml").write_text(RECIPE.format(folder=tmp_path))
    mine, before = Mine(tmp_path), [digests(tmp_path / one) for one in ("shards", "photos")]

    made = []
    for root, begun in ((tmp_path / "runs", ""), (tmp_path / "killed", "verify/*/*")):
        command = [sys.executable, "-c", MAKE_STEPS, mine.recipe, root]
        child = subprocess.Popen(command)
        while begun and not list(root.glob(begun)):
            time.sleep(0.01)
        if begun:
            child.kill()
            child.wait()
            child = subprocess.Popen(command)
        assert child.wait() == 0
        kept = (
            "dataset/*/shards.json",
            "dataset/*/left_out.parquet",
            "train/*/model/*.safetensors",
        )
        made.append([next(root.glob(name)).read_bytes() for name in kept])
    assert made[0] == made[1], "kill -9 changes nothing"

    [found] = trace_sample(root=mine.root, url=urls[7])
    assert found.shard.startswith(f"{tmp_path}/shards/")
    assert [model.name for model in found.versions[0].models] == ["tune"]
    (tmp_path / "list.txt").write_text(urls[7])
    [done] = take_down(tmp_path / "list.txt", mine.root)
    assert done.new.counts["samples"] == 49
    assert [digests(tmp_path / one) for one in ("shards", "photos")] == before


def test_a_source_that_is_not_there_is_one_sentence_and_nothing_is_made(tmp_path: Path) -> None:
    mine = write_mine(tmp_path)
    (tmp_path / "photos/captions.csv").unlink()
    refused = run(["run", "prepare", mine.recipe], mine.root)
    assert refused.status == 2
    assert "but no captions: put NAME.txt beside NAME.jpg" in refused.errors
    assert "Traceback" not in refused.errors
    assert not (mine.root / "adopt").exists()


def test_inspect_says_form_samples_and_what_would_be_left_out(mine: Mine) -> None:
    said = run(["sources", "inspect", str(mine.folder / "shards")], mine.root).output
    assert "form 'shards', 2 files" in said and "80 images with captions" in said
    assert "1 would be left out: no_caption" in said
    said = run(["sources", "inspect", str(mine.folder / "photos/captions.csv")], mine.root).output
    assert "form 'table'" in said and "10 images with captions" in said
    assert "captions.csv, line 5" in said.replace("\n", "")
