"""Test images among training samples: found by bytes and by look, in what a version uses only."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from evaclip_model.zeroshot.exact_ranks import Ranking
from tasks.evaluate.metrics.compute import (
    TrainingData,
    compute_figures,
    figures_without,
    hash_set,
    seen_in_training,
)
from tasks.evaluate.metrics.scored import Scored
from tasks.evaluate.sets.published_layout import EvalSet, open_set
from tasks.index.perceptual_hash import hash_images
from tasks.index.sample_index import COLUMNS, INDEX, write_index
from tasks.progress import report_nothing
from tests.tasks.evaluate.answers import answered, caption_set, class_set, label_set

IMAGES = 8
Member = tuple[str, bytes]


def photograph(seed: int, side: int = 64, quality: int = 90) -> bytes:
    """Smooth random colours, as JPEG."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


@pytest.fixture
def evalset(tmp_path: Path, write: Callable[..., Path]) -> EvalSet:
    """Eight photographs of two classes."""
    members: list[Member] = []
    for number in range(IMAGES):
        members.append((f"s{number}.jpg", photograph(number)))
        members.append((f"s{number}.cls", str(number % 2).encode()))
    folder = write(
        tmp_path / "photographs",
        [members],
        classnames="even\nodd\n",
        zeroshot_classification_templates="{c}\n",
    )
    return open_set("photographs", folder, "classification")


def trained_on(
    folder: Path, images: Sequence[bytes | None], left_out: Mapping[int, str]
) -> TrainingData:
    """A version of a dataset of these images (None: one that cannot be decoded), as its stages
    leave it."""
    folder.mkdir()
    hashes = hash_images([image or b"" for image in images])
    rows = [
        {name: None for name in COLUMNS.names}
        | {"key": str(number), "uid": f"uid {number}", "source": "s", "sha256": digest}
        | {"stored_sha256": digest, "phash": int(look) if decoded else None}
        for number, (digest, look, decoded) in enumerate(
            zip(hashes.sha256, hashes.looks.tolist(), hashes.decoded.tolist(), strict=True)
        )
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=COLUMNS), folder / "0.parquet")
    write_index([folder / "0.parquet"], folder / INDEX, "200MB")
    table = pa.table(
        {"row": pa.array(left_out.keys(), pa.int64()), "reason": list(left_out.values())},
        schema=pa.schema([("row", pa.int64()), ("reason", pa.string())]),
    )
    pq.write_table(table, folder / "left_out.parquet")
    return TrainingData(folder, folder / "left_out.parquet")


def seen(evalset: EvalSet, tmp_path: Path, *data: TrainingData, most: int = 4) -> list[int]:
    hashes = {evalset.name: hash_set(evalset, tmp_path / "hashes")}
    mask = seen_in_training(hashes, data, most, report_nothing)[evalset.name]
    return np.flatnonzero(mask).tolist()


def test_hashes_are_of_the_images_in_their_order_and_made_once(
    evalset: EvalSet, tmp_path: Path
) -> None:
    made = hash_set(evalset, tmp_path / "hashes")
    content = [photograph(number) for number in range(IMAGES)]
    assert list(made.sha256) == [hashlib.sha256(image).hexdigest() for image in content]
    for sample in evalset.samples:
        sample.image.tar.unlink(missing_ok=True)
    again = hash_set(evalset, tmp_path / "hashes")
    assert again.sha256 == made.sha256
    assert np.array_equal(again.looks, made.looks) and again.decoded.all()
    assert [path.name[0] for path in (tmp_path / "hashes").iterdir()] == ["p"]


def test_copies_and_look_alikes_are_found_and_other_images_are_not(
    evalset: EvalSet, tmp_path: Path
) -> None:
    smaller, coarser = photograph(3, side=49), photograph(5, quality=40)
    data = trained_on(
        tmp_path / "v",
        [photograph(100), photograph(1), None, smaller, coarser, photograph(101)],
        {},
    )
    assert seen(evalset, tmp_path, data) == [1, 3, 5]


def test_what_the_version_leaves_out_was_not_trained_on(evalset: EvalSet, tmp_path: Path) -> None:
    images = [photograph(1), photograph(2), photograph(3, side=49)]
    data = trained_on(tmp_path / "v", images, {0: "evaluation", 2: "near_duplicate"})
    assert seen(evalset, tmp_path, data) == [2]


def test_all_versions_that_a_model_was_trained_on_count(evalset: EvalSet, tmp_path: Path) -> None:
    data = [trained_on(tmp_path / str(number), [photograph(number)], {}) for number in (0, 6)]
    assert seen(evalset, tmp_path, *data) == [0, 6]
    assert seen(evalset, tmp_path) == []


def test_a_stored_image_counts_as_much_as_the_downloaded_one(
    evalset: EvalSet, tmp_path: Path
) -> None:
    data = trained_on(tmp_path / "v", [photograph(100)], {})
    table = pq.read_table(tmp_path / "v" / "0.parquet").to_pylist()
    table[0]["sha256"] = hashlib.sha256(photograph(4)).hexdigest()
    pq.write_table(pa.Table.from_pylist(table, schema=COLUMNS), tmp_path / "v" / "0.parquet")
    for file in (tmp_path / "v" / INDEX).rglob("*.parquet"):
        file.unlink()
    write_index([tmp_path / "v" / "0.parquet"], tmp_path / "v" / INDEX, "200MB")
    assert seen(evalset, tmp_path, data) == [4]


def test_sets_are_told_apart_in_one_pass(evalset: EvalSet, tmp_path: Path) -> None:
    data = trained_on(tmp_path / "v", [photograph(2), photograph(50)], {})
    sets = {
        "first": hash_images([photograph(n) for n in (1, 2)]),
        "second": hash_images([photograph(n) for n in (50, 51)]),
        "unreadable": hash_images([b"no image"]),
    }
    found = seen_in_training(sets, [data], 4, report_nothing)
    assert {name: mask.tolist() for name, mask in found.items()} == {
        "first": [False, True],
        "second": [True, False],
        "unreadable": [False],
    }


def test_figures_without_some_images_are_those_of_the_set_without_them() -> None:
    labels, said, names = [0, 1, 2, 0], [0, 1, 0, 1], ("a", "b", "c")
    evalset = class_set(labels, names)
    whole = Scored(evalset, classes=answered(evalset, said))
    found = figures_without(whole, np.array([True, False, False, False]))
    smaller = class_set(labels[1:], names)
    assert found == compute_figures(Scored(smaller, classes=answered(smaller, said[1:])))
    assert figures_without(whole, np.ones(4, np.bool_)) is None
    assert figures_without(whole, np.zeros(4, np.bool_)) == compute_figures(whole)


def test_figures_without_some_images_leave_their_captions_out_and_keep_the_answers() -> None:
    evalset = caption_set([2, 3, 2])

    def ranked(ranks: list[int]) -> Ranking:
        tensor = torch.tensor(ranks)
        return Ranking(tensor, tensor, tensor, tensor < 0, tensor[:, None])

    scored = Scored(evalset, texts=ranked([0, 9, 0]), images=ranked([0, 0, 9, 9, 0, 0, 9]))
    found = figures_without(scored, np.array([False, True, False]))
    assert found is not None
    assert (found["n"], found["captions"]) == (2, 4)
    assert (found["image_to_text_r1"], found["text_to_image_r1"]) == (1.0, 0.75)


def test_figures_without_some_images_of_several_classes() -> None:
    shown = [[0], [1], [0, 1], []]
    evalset = label_set(shown, ("a", "b"))
    scores = torch.tensor([[3.0, 1], [2, 2], [1, 3], [0, 0]])
    found = figures_without(Scored(evalset, scores=scores), np.array([True, False, False, False]))
    smaller = label_set(shown[1:], ("a", "b"))
    assert found == compute_figures(Scored(smaller, scores=scores[1:]))


def test_there_are_no_figures_where_only_images_without_a_class_are_left() -> None:
    evalset = label_set([[0], []], ("a",))
    scored = Scored(evalset, scores=torch.tensor([[1.0], [0.0]]))
    assert figures_without(scored, np.array([True, False])) is None
