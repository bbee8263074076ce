"""`lineage` on what the small demo left: upwards from the model, downwards from its data."""

from __future__ import annotations

import json
from pathlib import Path

from mlflow import MlflowClient

from flows.graph.ancestry import describe_changes, upward_tree
from tasks.artifacts.artifact import Change, Lineage, read_artifacts
from tests.flows.command import Demo, run


def digests(root: Path) -> dict[str, str]:
    """Title -> digest of the registration and what it descends from: another test may score too."""
    there = {one.digest: one for one in read_artifacts(root)}
    (registered,) = [one for one in there.values() if one.kind == "register"]
    found, ahead = {}, [registered]
    while ahead:
        one = ahead.pop()
        found[f"train {one.config['name']}" if one.kind == "train" else one.kind] = one.digest
        ahead += [there[parent] for parent in one.parents.values() if parent in there]
    return found


def test_a_models_tree_names_all_that_it_was_made_from(finished: Demo) -> None:
    ended = run(["lineage", "models:/evaclip-demo@champion"], finished.root)
    assert ended.status == 0, ended.errors
    made = digests(finished.root)
    del made["register"]
    for title, digest in made.items():
        assert f"{title} {digest}" in ended.output
    first, *_ = ended.output.splitlines()
    assert first.startswith("evaclip-demo/1 ") and "@champion" in first
    assert "no other version of evaclip-demo to compare with" in ended.output


def test_a_source_and_a_dataset_lead_down_to_the_registered_version(finished: Demo) -> None:
    made = digests(finished.root)
    down = run(["lineage", "laion2b"], finished.root)
    assert down.status == 0, down.errors
    for title in ("merge", "dataset", "train stage2", "register"):
        assert made[title] in down.output
    both = run(["lineage", made["dataset"][:8]], finished.root)
    up, _, below = both.output.partition("made of it")
    assert made["merge"] in up and made["train stage2"] in below
    assert "registered from it: evaclip-demo/1" in below


def test_what_is_not_there_is_one_sentence_with_what_is(finished: Demo) -> None:
    ended = run(["lineage", "laion5b"], finished.root)
    assert ended.status == 2
    assert "its sources; those are: coyo700m, laion2b" in ended.errors
    ended = run(["lineage", "evaclip-demo@best"], finished.root)
    assert ended.status == 2
    assert "evaclip-demo@champion" in ended.errors


def test_a_registration_keeps_the_document_that_travels_with_the_model(finished: Demo) -> None:
    (file,) = finished.root.glob("register/*/lineage.json")
    lineage = Lineage.from_mapping(json.loads(file.read_text()), "lineage.json")
    (shipped,) = finished.root.glob("mlflow-artifacts/**/lineage.json")
    assert shipped.read_text() == file.read_text()
    lines = list(upward_tree(lineage))
    assert lines[0].startswith("evaluate ")
    assert sum("merge " in line for line in lines) == 1, "what was shown is only named again"


def test_changes_are_told_one_a_line() -> None:
    found = [
        Change("train.one: lr", 0.1, 0.2),
        Change("train.two", None, "ab"),
        Change("x", 1, None),
    ]
    assert list(describe_changes(found)) == [
        "  train.one: lr: 0.1 -> 0.2",
        "  train.two: ab (new)",
        "  x: 1 (gone)",
    ]
    assert list(describe_changes([])) == ["  no setting and no data changed"]


def test_the_report_and_the_tracking_run_show_the_picture(finished: Demo) -> None:
    made = digests(finished.root)
    (report,) = finished.root.glob(f"evaluate/{made['evaluate']}/report.html")
    page = report.read_text()
    assert 'aria-label="Lineage"' in page
    (kept,) = finished.root.glob("mlflow-artifacts/*/artifacts/lineage.svg")
    picture = kept.read_text()
    for title in ("merge", "dataset", "train stage1", "train stage2"):
        assert f">{made[title]}</text>" in page and f">{made[title]}</text>" in picture
    assert "evaclip-demo/1" in picture


def test_tracking_names_the_sources_that_the_merge_read(finished: Demo) -> None:
    store = MlflowClient(f"sqlite:///{finished.root}/mlflow.db")
    experiment = store.get_experiment_by_name("demo").experiment_id
    (merge,) = store.search_runs([experiment], "attributes.run_name = 'merge'")
    read = {one.dataset.name: one.dataset.digest for one in merge.inputs.dataset_inputs}
    demo = digests(finished.root)["demo"]
    assert read == {"laion2b": demo, "coyo700m": demo}
