"""`trace` and `takedown` on what the small demo left: one sample's way down to the models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from evaclip_model.reading.samples import SampleReader, ShardManifest, read_tombstones
from flows.audit.sample_trace import take_down, trace_sample
from flows.config.recipe import load_recipe
from flows.graph.graph import draw_graph
from tasks.artifacts.artifact import MANIFEST, Artifact, read_artifacts
from tasks.index.sample_index import SampleIndex
from tests.flows.command import Demo, run


@pytest.fixture(scope="module")
def root(finished: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of everything that the demo made."""
    copy = tmp_path_factory.mktemp("copy") / "runs"
    shutil.copytree(finished.root, copy, ignore=shutil.ignore_patterns("prefect", "mlflow*"))
    return copy


@pytest.fixture(scope="module")
def made(root: Path) -> dict[str, Artifact]:
    """Kind -> artifact, before anything was taken down."""
    return {artifact.kind: artifact for artifact in read_artifacts(root)}


@pytest.fixture(scope="module")
def wanted(made: dict[str, Artifact]) -> dict[str, object]:
    """One sample, from the middle of the index."""
    chunk = next(
        SampleIndex(made["verify"].folder).iterate_chunks(
            "row", "uid", "url", "sha256", "source", "key"
        )
    )
    return chunk.slice(chunk.num_rows // 2, 1).to_pylist()[0]


def trained(root: Path) -> list[str]:
    return [artifact.digest for artifact in read_artifacts(root) if artifact.kind == "train"]


@pytest.mark.parametrize("name", ["uid", "url", "sha256"])
def test_a_sample_is_traced_to_its_row_shard_dataset_and_models(
    root: Path, made: dict[str, Artifact], wanted: dict[str, object], name: str
) -> None:
    (found,) = [
        one
        for one in trace_sample(root=root, **{name: str(wanted[name])})
        if one.row["row"] == wanted["row"]
    ]
    assert {key: found.row[key] for key in wanted} == wanted
    assert Path(found.shard).is_file()
    assert [artifact.digest for artifact in found.made_by] == [
        made[kind].digest for kind in ("merge", "download", "verify")
    ]
    (version,) = found.versions
    assert (version.digest, version.left_out) == (made["dataset"].digest, None)
    assert sorted(model.digest for model in version.models) == sorted(trained(root))
    (last,) = [model for model in version.models if model.name == "stage2"]
    assert list(map(str, last.registered)) == ["evaclip-demo/1"]


def test_a_published_form_of_a_url_finds_the_same_sample(
    root: Path, wanted: dict[str, object]
) -> None:
    published = str(wanted["url"]).replace("http://", " HTTPS://") + "#top"
    assert [one.row["uid"] for one in trace_sample(root=root, url=published)] == [wanted["uid"]]


def test_the_command_says_where_a_sample_is_and_what_was_made_of_it(
    root: Path, made: dict[str, Artifact], wanted: dict[str, object]
) -> None:
    ended = run(["trace", "--uid", str(wanted["uid"])], root)
    assert ended.status == 0, ended.errors
    for name in ("url", "source", "key"):
        assert str(wanted[name]) in ended.output
    assert "    run     " in ended.output
    assert "    version evaclip-demo/1 @challenger @champion\n" in ended.output
    assert f"{made['dataset'].digest}: holds it" in ended.output


def test_a_stage_between_verification_and_dataset_breaks_neither_trace_nor_takedown(
    root: Path, made: dict[str, Artifact], wanted: dict[str, object], tmp_path: Path
) -> None:
    """Whatever its name and its role: a later stage is found by walking, not by being known."""
    copied = tmp_path / "runs"
    shutil.copytree(root, copied)
    between = {**manifest_of(made["verify"]), "kind": "score_images", "digest": "5" * 16}
    put(copied, {**between, "parents": {"verify": made["verify"].digest}})
    version = copied / "dataset" / ("d" * 16)
    shutil.copytree(made["dataset"].folder, version)
    put(
        copied,
        {**manifest_of(made["dataset"]), "digest": version.name, "parents": {"scores": "5" * 16}},
    )
    (found,) = [
        one
        for one in trace_sample(root=copied, uid=str(wanted["uid"]))
        if one.row["row"] == wanted["row"]
    ]
    assert {one.digest: one.left_out for one in found.versions} == {
        made["dataset"].digest: None,
        version.name: None,
    }
    file = tmp_path / "requests.txt"
    file.write_text(f"{wanted['uid']}\n")
    replaced = {one.old.digest: one.new for one in take_down(file, copied)}
    assert set(replaced) == {made["dataset"].digest, version.name}
    assert replaced[version.name].parents["scores"] == "5" * 16


def manifest_of(artifact: Artifact) -> dict[str, object]:
    found: dict[str, object] = json.loads((artifact.folder / MANIFEST).read_text())
    return found


def put(root: Path, manifest: dict[str, object]) -> None:
    folder = root / str(manifest["kind"]) / str(manifest["digest"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_what_was_never_stored_is_one_sentence(root: Path) -> None:
    ended = run(["trace", "--url", "http://127.0.0.1/none.jpg"], root)
    assert ended.status == 2
    assert ended.errors.startswith("error: no sample under ")


def held(version: Artifact) -> int:
    """Samples that the trainer's reader finds in a version."""
    count = 0
    for shard in ShardManifest.read(version.folder / "shards.json").shards:
        reader = SampleReader(
            version.folder / shard.path, read_tombstones(str(version.folder), shard)
        )
        count += len(reader.read(0, 10**6))
        reader.close()
    return count


def test_a_takedown_makes_a_version_without_the_sample_and_names_the_models(
    root: Path, finished: Demo, made: dict[str, Artifact], wanted: dict[str, object], tmp_path: Path
) -> None:
    file = tmp_path / "requests.txt"
    file.write_text(f"# received today\n{wanted['url']}\nnobody-knows-this-uid\n")
    kept = {path: path.stat().st_mtime_ns for path in root.glob("download/*/**/*")}
    ended = run(["takedown", str(file)], root)
    assert ended.status == 0, ended.errors
    (new,) = [
        one
        for one in read_artifacts(root)
        if one.kind == "dataset" and one.digest != made["dataset"].digest
    ]
    removed = made["dataset"].counts["samples"] - new.counts["samples"]
    assert removed >= 1
    assert held(new) == new.counts["samples"]
    assert f"{made['dataset'].digest} -> {new.digest}" in ended.output
    assert "1 of 2 entries name no sample of any dataset version" in ended.output
    assert "  nobody-knows-this-uid" in ended.output
    assert all(digest in ended.output for digest in (*trained(root), "evaclip-demo/1 @challenger"))
    assert kept == {path: path.stat().st_mtime_ns for path in root.glob("download/*/**/*")}

    before, after = next(iter(trace_sample(root=root, uid=str(wanted["uid"])))).versions
    assert (before.left_out, after.left_out, after.models) == (None, "takedown", ())

    # the recipe with this list asks for that very version
    overrides = [*finished.overrides, f"dataset.takedowns=['{file}']"]
    graph = draw_graph(load_recipe("demo", overrides), root, f"sqlite:///{root}/mlflow.db")
    assert graph.dataset.digest == new.digest
    assert not graph.train[0].is_finished

    again = run(["takedown", str(file)], root)
    assert f"{new.digest} obeys this already" in again.output

    more = tmp_path / "more.txt"
    (first,) = [row for row in SampleIndex(made["verify"].folder).iterate_chunks("uid")]
    more.write_text(f"{first['uid'][0].as_py()}\n")
    (succession,) = take_down(more, root)
    assert succession.old.digest == new.digest
    assert succession.new.counts["samples"] < new.counts["samples"]
    entries = (succession.new.folder / "takedowns.txt").read_text().splitlines()
    assert sorted(entries) == entries
    assert {str(wanted["url"]), first["uid"][0].as_py()} <= set(entries)


def test_a_takedown_obeys_those_of_versions_that_were_made_beside_each_other(
    root: Path, made: dict[str, Artifact], tmp_path: Path
) -> None:
    chunk = next(SampleIndex(made["verify"].folder).iterate_chunks("uid"))
    first, second, third = chunk["uid"].to_pylist()[-3:]

    def takedown_of(*uids: str) -> Artifact:
        file = tmp_path / "-".join(uids)
        file.write_text("\n".join(uids))
        return take_down(file, root)[0].new

    versions = {artifact.digest for artifact in read_artifacts(root)}
    beside = takedown_of(first)
    for path in root.glob("dataset/*"):  # as if the next one was made on another machine
        if path.name not in versions:
            path.rename(root / "beside")
    takedown_of(second)
    (root / "beside").rename(beside.folder)
    last = takedown_of(third)
    for uid in (first, second, third):
        held_by = {v.digest: v.left_out for v in trace_sample(root=root, uid=uid)[0].versions}
        assert held_by[last.digest] == "takedown"
    assert held(last) == last.counts["samples"]


def test_a_takedown_of_what_no_dataset_holds_changes_nothing(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "requests.txt"
    file.write_text("nobody-knows-this-uid\n")
    before = [artifact.digest for artifact in read_artifacts(root)]
    ended = run(["takedown", str(file)], root)
    assert "holds any of these samples" in ended.output
    assert [artifact.digest for artifact in read_artifacts(root)] == before


def test_a_takedown_list_that_is_not_there_is_one_sentence(root: Path) -> None:
    ended = run(["takedown", "/nowhere/list.txt"], root)
    assert ended.status == 2
    assert "/nowhere/list.txt cannot be read as a text file" in ended.errors
    assert "Traceback" not in ended.errors


def test_the_report_of_a_version_adds_up(made: dict[str, Artifact]) -> None:
    report = json.loads((made["dataset"].folder / "report.json").read_text())
    assert report["samples"] + report["left_out"] == SampleIndex(made["verify"].folder).rows
    assert sum(source["samples"] for source in report["sources"].values()) == report["samples"]
