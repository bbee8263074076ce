"""What artifacts were made from, as a document, and what changed between two of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tasks.artifacts.artifact import (
    Address,
    Artifact,
    Change,
    Lineage,
    Made,
    Stage,
    lineage_of,
    list_changes,
    produce_artifact,
)


def made(root: Path, kind: str, config: dict[str, Any], **parents: str) -> Artifact:
    address = Address(root, Stage(kind, 1), config, parents)
    return produce_artifact(address, lambda out: Made({"rows": 3}, ()))


def chain(root: Path, rate: float = 0.1, data: str = "a" * 16) -> list[Artifact]:
    """Merge of outside data, initial weights, two stages of training, evaluation."""
    sources = ({"name": "laion", "count": 3}, {"name": "coyo", "count": 4})
    merge = made(root, "merge", {"sources": sources}, laion=data, coyo="c" * 16)
    start = made(root, "initialise", {"seed": 0})
    one = made(
        root, "train", {"name": "one", "lr": rate}, start_from=start.digest, data=merge.digest
    )
    two = made(root, "train", {"name": "two", "lr": 1}, start_from=one.digest, data=merge.digest)
    evaluate = made(root, "evaluate", {}, train=two.digest, initialise=start.digest)
    return [merge, start, one, two, evaluate]


def test_every_ancestor_is_there_once_behind_what_it_was_made_from(tmp_path: Path) -> None:
    artifacts = chain(tmp_path)
    lineage = lineage_of([artifacts[-1], artifacts[-2]], tmp_path)
    digests = [node.digest for node in lineage.nodes]
    assert sorted(digests) == sorted(artifact.digest for artifact in artifacts)
    for place, node in enumerate(lineage.nodes):
        assert all(p in digests[:place] for p in node.parents.values() if p in digests)
    assert lineage.outside_fingerprints() == {"merge.laion": "a" * 16, "merge.coyo": "c" * 16}
    assert lineage.heads == (artifacts[-1].digest, artifacts[-2].digest)
    assert {"merge", "initialise", "train.one", "train.two", "evaluate", "merge.laion"} < set(
        lineage.unique_labels() | {"": ""}
    )


def test_the_document_is_read_back_as_it_was(tmp_path: Path) -> None:
    lineage = lineage_of(chain(tmp_path)[-1:], tmp_path)
    again = Lineage.from_mapping(json.loads(lineage.to_json()), "lineage.json")
    assert again == lineage


def test_what_is_gone_is_outside_data(tmp_path: Path) -> None:
    artifacts = chain(tmp_path)
    (artifacts[0].folder / "manifest.json").unlink()
    lineage = lineage_of(artifacts[-1:], tmp_path)
    assert lineage.outside_fingerprints()["train.two.data"] == artifacts[0].digest


def test_changes_are_settings_data_and_stages_not_what_follows_from_them(tmp_path: Path) -> None:
    def lineage(*heads: Artifact) -> Lineage:
        return lineage_of(heads, tmp_path)

    first = chain(tmp_path)
    assert list_changes(lineage(first[-1]), lineage(first[-1])) == []
    second = chain(tmp_path, rate=0.2, data="b" * 16)
    assert list_changes(lineage(first[-1]), lineage(second[-1])) == [
        Change("merge: laion", "a" * 16, "b" * 16),
        Change("train.one: lr", 0.1, 0.2),
    ]
    shorter = made(tmp_path, "evaluate", {}, train=first[2].digest)
    assert list_changes(lineage(first[-1]), lineage(shorter)) == [
        Change("train.two", first[3].digest, None)
    ]


def test_items_of_a_list_go_by_their_names(tmp_path: Path) -> None:
    old = made(tmp_path, "merge", {"sources": [{"name": "laion", "count": 3}]})
    new = made(tmp_path, "merge", {"sources": [{"name": "laion", "count": 4}]})
    (change,) = list_changes(lineage_of([old], tmp_path), lineage_of([new], tmp_path))
    assert change == Change("merge: sources.laion.count", 3, 4)
