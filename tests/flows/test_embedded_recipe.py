"""A recipe whose samples a model looks at: scores decide, nothing is embedded twice, find finds."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from evaclip_model.create import create_model
from evaclip_model.errors import InputError
from evaclip_model.model.model_config import ModelConfig
from evaclip_model.weights.load import save_model
from evaclip_model.zeroshot.encode_chunks import embed_images
from flows.audit import sample_search
from flows.audit.sample_search import SampleSearch
from flows.config.profile import Profile
from flows.config.recipe import load_recipe
from flows.graph.graph import Graph, adopt_step, draw_graph, embed_steps, join_step, verify_step
from tasks.adopt.config import AdoptConfig
from tasks.artifacts.artifact import Artifact, Role
from tasks.dataset import choose, dataset
from tasks.embed.search import Wanted
from tasks.encoders.open_models import open_subject
from tasks.progress import report_nothing
from tests.flows.command import run
from tests.flows.test_adopted_recipe import Mine, write_mine
from tests.tasks.adopt.test_adopt import pack, stranger


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Mine:
    return write_mine(tmp_path_factory.mktemp("embedded"))


@pytest.fixture(scope="module")
def model(mine: Mine) -> Path:
    config = ModelConfig.load("EVA02-CLIP-demo").at_image_px(16)
    save_model(create_model(config, seed=5), mine.folder / "judge")
    return mine.folder / "judge"


def draw(mine: Mine, *changes: str) -> Graph:
    return draw_graph(load_recipe(mine.recipe, changes), mine.root, "sqlite:///none")


@pytest.fixture(scope="module")
def embedded(mine: Mine, model: Path) -> dict[str, Artifact]:
    """Kind -> artifact, of a version that keeps the better half of each source."""
    graph = draw(mine, f"embed.models=['{model}']", "dataset.keep_share=0.5")
    profile = Profile(root=mine.root)
    return {s.stage.name: s.make_artifact(profile, report_nothing) for s in graph.data_steps}


def test_half_of_each_source_stays_the_half_that_the_model_likes_best(embedded) -> None:
    counts = embedded["dataset"].counts
    assert (counts["shards.samples"], counts["photos.samples"]) == (40, 5)
    assert counts["left_out.low_score"] == 45
    files = sorted((embedded["embed"].folder / "features").glob("*.parquet"))
    photos = pq.read_table(files[-1])["similarity"].to_numpy()
    left_out = pq.read_table(embedded["dataset"].folder / "left_out.parquet").to_pylist()
    last = [one["row"] for one in left_out if one["reason"] == "low_score"][-5:]
    first_row = embedded["verify"].counts["samples"] + 1 - len(photos)  # one has no caption
    mine_rows = np.array(last) - first_row
    assert photos[mine_rows].max() <= np.delete(photos, mine_rows).min()
    assert "the best 50.0% of each source" in (embedded["dataset"].folder / "card.md").read_text()


def embedded_photos(embedded: dict[str, Artifact]) -> int:
    last = sorted((embedded["embed"].folder / "features").glob("*.parquet"))[-1]
    return pq.read_metadata(last).num_rows


def test_another_threshold_is_another_version_of_the_same_features(mine, model, embedded) -> None:
    graph = draw(mine, f"embed.models=['{model}']", "dataset.min_score=0.9")
    assert [step.digest for step in graph.embed] == [embedded["embed"].digest]
    assert graph.dataset.digest != embedded["dataset"].digest
    assert draw(mine, f"embed.models=['{model}']").dataset.digest == draw(mine).dataset.digest


def test_the_next_retraining_embeds_only_the_shards_that_it_adopts(mine, model, embedded) -> None:
    """Also when another recipe asks, and by another name of the same weights."""
    pack(mine.folder / "more/0.tar", [stranger(number) for number in range(300, 310)])
    copy = shutil.copytree(model, mine.folder / "copy_of_judge")
    recipe = load_recipe(mine.recipe, [f"embed.models=['{copy}']", "train.tune.samples_seen=128"])
    site, profile = draw(mine).site, Profile(root=mine.root)
    more = {"sources": [{"name": "shards", "files": f"{mine.folder}/more"}]}
    adoption = adopt_step(site, AdoptConfig.from_mapping(more, where="test"), [embedded["adopt"]])
    new = verify_step(site, recipe.verify, adoption, Role.ADOPT)
    for step in (adoption, new):
        step.make_artifact(profile, report_nothing)
    files = {f: f.stat().st_mtime_ns for f in embedded["embed"].folder.glob("features/*")}
    known, asked = embed_steps(site, recipe.embed, join_step(site, [embedded["verify"], new]))
    assert known.digest == embedded["embed"].digest and not asked.is_finished
    made = [step.make_artifact(profile, report_nothing) for step in (known, asked)]
    assert made[0] == embedded["embed"]
    assert {file: file.stat().st_mtime_ns for file in files} == files
    assert made[1].counts["samples"] == 10
    assert len(list((mine.root / "embed").iterdir())) == 2
    shutil.rmtree(made[1].folder)  # other tests search one artifact


def test_equal_shards_of_another_adoption_are_not_embedded_again(mine, model, embedded) -> None:
    shutil.copytree(mine.folder / "shards", mine.folder / "wider")
    pack(mine.folder / "wider/new.tar", [stranger(number) for number in range(400, 410)])
    changes = [f"embed.models=['{model}']", f"adopt.sources.shards.files={mine.folder}/wider"]
    graph, profile = draw(mine, *changes), Profile(root=mine.root)
    for step in graph.data_steps[:-1]:
        made = step.make_artifact(profile, report_nothing)
    known = {file.stat().st_ino for file in embedded["embed"].folder.glob("features/*")}
    files = list(made.folder.glob("features/*"))
    new = [file for file in files if file.stat().st_ino not in known]
    assert len(files) == len(known) + 1 and [pq.read_metadata(file).num_rows for file in new] == [
        10
    ]
    shutil.rmtree(made.folder)  # other tests search one artifact


def test_a_teacher_looks_at_what_a_stage_will_show_once_for_all_its_students(mine, model) -> None:
    asked = (f"train.tune.teacher.models=['{model}']", "train.tune.samples_seen=128")
    graph, profile = draw(mine, *asked), Profile(root=mine.root)
    (teach,) = (step for step in graph.steps if step.stage.name == "teach")
    embed_dim = 4 * ModelConfig.load(model).embed_dim
    assert teach.expected_bytes == 128 * embed_dim and teach.what.endswith("shown, 98 kB")
    made = {step.stage.name: step for step in graph.steps}
    for step in (*graph.data_steps, made["initialise"], teach, graph.train[-1]):
        if not step.is_finished:
            step.make_artifact(profile, report_nothing)
    (features,) = teach.folder.glob("features/*")
    assert np.load(features).shape == (128, 2, embed_dim // 4)

    def found(*changes: str) -> tuple[str, str]:
        other = draw(mine, *asked, *changes)
        digests = {step.stage.name: step.digest for step in other.steps}
        return digests["teach"], digests["train"]

    same, trained = teach.digest, graph.train[-1].digest
    for change in ("lr_text=1e-5", "teacher.weight=0.7", "image_px=48", "text_tokens=9"):
        of_teacher, of_student = found(f"train.tune.{change}")
        assert of_teacher == same and of_student != trained
    for change in ("seed=7", "caption_separator=' '", "teacher.precision='bf16'", "lanes=2"):
        assert found(f"train.tune.{change}")[0] != same


def test_features_decide_once_and_thresholds_take_their_choice_over(mine, model, embedded) -> None:
    """Of all pairs within the angle the one with the lower score goes; so does what is near to a
    picture that no hash takes for it."""
    features = [pq.read_table(f) for f in sorted(embedded["embed"].folder.glob("features/*"))]
    wide = np.concatenate([np.array(t["image"].to_pylist(), dtype=np.float64) for t in features])
    scores = np.concatenate([table["similarity"].to_numpy() for table in features])
    picture = mine.folder / "shown" / "noise.png"
    picture.parent.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(picture)
    subject = open_subject(str(model))
    with Image.open(picture) as shown:
        feature = embed_images(subject, iter([subject.transform(shown.convert("RGB"))]))
    to_picture = angles(wide, feature.numpy().astype(np.float16).astype(np.float64))[:, 0]
    near = float(np.sort(to_picture)[2:4].mean())
    left = to_picture > near
    between = angles(wide[left], wide[left])
    np.fill_diagonal(between, 180)
    apart = float(np.sort(between.min(axis=1))[20:22].mean())
    better = (scores[left] > scores[left][:, None]) & (between <= apart)
    changes = (
        f"embed.models=['{model}']",
        f"dataset.semantic_duplicates={apart}",
        f"dataset.near_evaluation={near}",
        f"dataset.evaluation_sets=['{picture.parent}']",
    )
    profile = Profile(root=mine.root)
    first, second = (draw(mine, *changes, *more) for more in ((), ("dataset.keep_share=0.5",)))
    made = {step.digest: step.make_artifact(profile, report_nothing) for step in first.data_steps}
    counts = made[first.dataset.digest].counts
    assert counts["left_out.near_evaluation"] == 3
    assert counts["left_out.semantic_duplicate"] == int(better.any(axis=1).sum()) > 0
    assert not (first.dataset.folder / "search").exists()
    assert first.dataset.digest in [step.digest for step in second.data_steps]
    unfinished = [step for step in second.data_steps if not step.is_finished]
    assert [step.digest for step in unfinished] == [second.dataset.digest]
    halved = second.dataset.make_artifact(profile, report_nothing)
    assert halved.counts["left_out.semantic_duplicate"] == counts["left_out.semantic_duplicate"]
    card = (halved.folder / "card.md").read_text()
    assert "| score from | photos | kept | shards | kept |" in card
    assert "| 100.0% |" in card


def test_another_threshold_takes_over_what_all_other_rules_chose(
    mine: Mine, model: Path, embedded: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the version that the rules make from the beginning, at the same address as ever."""
    table = pq.read_table(embedded["embed"].folder / "features/000000.parquet")
    listed = mine.folder / "some.txt"
    listed.write_text("".join(f"{uid}\n" for uid in table["uid"].to_pylist()[:5]))
    changes = (f"embed.models=['{model}']", f"dataset.drop_uids=['{listed}']")
    profile, rules = Profile(root=mine.root), choose.choose_samples
    draw(mine, *changes, "dataset.min_score=-0.5").dataset.make_artifact(profile, report_nothing)
    base = draw(mine, *changes).dataset
    assert base.is_finished
    monkeypatch.setattr(choose, "choose_samples", None)  # no rule is applied again
    step = draw(mine, *changes, "dataset.keep_share=0.3").dataset
    assert set(step.address.parents) == {"verify", "drop_uids", "scores0000"}
    names = ("shards.json", "tombstones.bin", "report.json", "left_out.parquet", "card.md")
    taken_over = step.make_artifact(profile, report_nothing)
    assert taken_over.counts["left_out.low_score"] > 0 and taken_over.counts["left_out.listed"] == 5
    files = [(taken_over.folder / name).read_bytes() for name in names]
    shutil.rmtree(taken_over.folder)
    shutil.rmtree(base.folder)
    monkeypatch.setattr(choose, "choose_samples", rules)
    make, at = dataset.make_dataset, "make_dataset"
    monkeypatch.setattr(dataset, at, lambda *given: make(*given[:-1], None))  # without a base
    scratch = step.make_artifact(profile, report_nothing)
    assert [(scratch.folder / name).read_bytes() for name in names] == files


def angles(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Degrees between rows."""
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (left, right)]
    return np.degrees(np.arccos(np.clip(unit[0] @ unit[1].T, -1, 1)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("dataset.semantic_duplicates=-1", "'dataset.semantic_duplicates'.*greater than or equal"),
        ("dataset.near_evaluation=91", "'dataset.near_evaluation'.*less than or equal to 90"),
        ("dataset.near_evaluation=5", "near_evaluation needs evaluation_sets"),
        ("dataset.semantic_duplicates=5", r"add an \[embed\] table"),
    ],
)
def test_angles_that_cannot_be_are_one_sentence(mine: Mine, change: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        draw(mine, change)


def test_scores_without_a_model_and_a_model_that_is_not_there_are_one_sentence(mine: Mine) -> None:
    with pytest.raises(InputError, match=r"scores and features: add an \[embed\] table"):
        draw(mine, "dataset.keep_share=0.5")
    graph = draw(mine, "embed.models=['nowhere']")
    with pytest.raises(InputError, match="model 'nowhere' is not there"):
        graph.require_runnable("prepare")


def test_find_shows_samples_like_another_one_by_text_or_picture(mine, embedded) -> None:
    table = pq.read_table(embedded["embed"].folder / "features/000000.parquet")
    uid = table["uid"][3].as_py()
    like = run(["find", "--like", uid, "--top", "2"], mine.root)
    assert like.status == 0, like.errors
    assert uid in like.output.splitlines()[0]
    assert f"{mine.folder}/shards/a/0.tar" in like.output
    (first,) = table.filter(pc.equal(table["uid"], uid))["similarity"].to_pylist()
    assert f"score {first:.3f}" in like.output.splitlines()[0]
    version = embedded["dataset"].digest
    assert f"in dataset {version}" in like.output or f"left out of dataset {version}" in like.output
    text = run(["find", "a red apple", "--top", "99"], mine.root)
    assert text.status == 0, text.errors
    assert text.output.count("  photos  score ") == embedded_photos(embedded)
    few = run(["find", "a red apple", "--source", "photos", "--min-score", str(first)], mine.root)
    shown = [line for line in few.output.splitlines() if "  score " in line]
    assert 0 < len(shown) <= embedded_photos(embedded)
    for line in shown:
        assert "  photos  score " in line
        assert float(line.rpartition(" ")[2]) >= round(first, 3)


def test_an_index_is_made_by_whoever_follows_it_and_used_by_all(mine, embedded, monkeypatch):
    pytest.importorskip("faiss", reason="the extra `search` installs it")
    profile, made = Profile(root=mine.root), mine.root / "search"
    exact = SampleSearch(profile)
    query = exact.feature_of("a red apple", "", b"")
    monkeypatch.setattr(sample_search, "EXACT_SAMPLES", 10)
    assert SampleSearch(profile)._searched[0].search_index is None, "a page does not wait for it"
    assert not made.exists()
    assert SampleSearch(profile, report=report_nothing)._searched[0].search_index
    page = SampleSearch(profile)
    assert page._searched[0].search_index
    for wanted in (Wanted(5, is_exact=True), Wanted(5, "photos", is_exact=True)):
        true, found = (one.find_samples(query, wanted) for one in (exact, page))
        assert [one.row["uid"] for one in found] == [one.row["uid"] for one in true]


def test_what_cannot_be_found_is_one_sentence(mine, embedded) -> None:
    wrong = run(["find", "--like", "nobody"], mine.root)
    assert (wrong.status, wrong.output) == (2, "")
    assert "no sample with uid 'nobody' was embedded" in wrong.errors
    nowhere = run(["find", "a red apple", "--source", "nowhere"], mine.root)
    assert (nowhere.status, nowhere.output) == (2, "")
    assert "there is nothing of source 'nowhere': " in nowhere.errors
    with (mine.folder / "judge/config.json").open("a") as config:
        config.write("\n")
    changed = run(["find", "a red apple"], mine.root)
    assert changed.status == 2
    assert "is not the model any more that embedded: run `prepare` again" in changed.errors
