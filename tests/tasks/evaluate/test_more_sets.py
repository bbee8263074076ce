"""Several right labels, long texts, DataComp's groups and average."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from evaclip_model.errors import InputError
from evaclip_model.zeroshot.statistics import f1_macro
from flows.graph.score_request import read_asked
from tasks.evaluate.config import EvaluateConfig
from tasks.evaluate.metrics.compute import compare_models, compute_figures
from tasks.evaluate.metrics.scored import Scored
from tasks.evaluate.results import _average_datacomp
from tasks.evaluate.sets.convert.convert import (
    Words,
    convert_captions,
    convert_imagefolder,
    convert_table,
)
from tasks.evaluate.sets.published_layout import open_set
from tasks.evaluate.sets.set_registry import DATACOMP, find_set, sets_of_group
from tests.tasks.evaluate.answers import answered, class_set, label_set


def test_real_counts_images_with_a_label_whose_first_answer_is_one_of_them():
    evalset = label_set([(0, 2), (1,), (), (2,)], "abc")
    evalset = replace(evalset, known=find_set("imagenet-real"))
    scores = torch.tensor([[0.1, 0.2, 0.9], [0.9, 0.1, 0.2], [0.9, 0.0, 0.0], [0.0, 0.7, 0.7]])
    figures = compute_figures(Scored(evalset, scores=scores))
    assert figures["real_top1"] == pytest.approx(1 / 3)  # the last ties: class 1 comes first
    assert figures["bounds"]["real_top1"] == pytest.approx((1 / 3, 2 / 3))
    assert "map" not in figures


def test_reals_list_is_joined_to_images_by_their_numbers(
    tmp_path: Path, disc: Callable[[str, int], bytes]
):
    images = tmp_path / "val"
    images.mkdir()
    for number in (1, 2, 3):
        path = images / f"ILSVRC2012_val_{number:08d}.JPEG"
        path.write_bytes(disc("red", number))
    (tmp_path / "real.json").write_text(json.dumps([[0], [], [5, 999]]))
    known = find_set("imagenet-real")
    made = convert_table(tmp_path / "real.json", images, tmp_path / "set", Words(known))
    evalset = open_set("imagenet-real", made.folder, "multilabel", "openai", known=known)
    assert [one.labels for one in evalset.samples] == [(0,), (), (5, 999)]
    assert len(evalset.classnames) == 1000


def objectnet(root: Path, disc: Callable[[str, int], bytes], first: int) -> Path:
    names = [f"name {n}" for n in range(1000)]
    mappings = {
        "folder_to_objectnet_label.json": {"alarm_clock": "Alarm clock", "spoon": "Spoon"},
        "objectnet_to_imagenet_1k.json": {"Alarm clock": "name 7; name 3"},
        "pytorch_to_imagenet_2012_id.json": {str(n): n + first for n in range(1000)},
    }
    (root / "mappings").mkdir(parents=True)
    for name, content in mappings.items():
        (root / "mappings" / name).write_text(json.dumps(content))
    (root / "mappings" / "imagenet_to_label_2012_v2").write_text("\n".join(names))
    for folder in ("alarm_clock", "spoon"):
        (root / "images" / folder).mkdir(parents=True)
        (root / "images" / folder / "1.png").write_bytes(disc("red", 1))
    return root


@pytest.mark.parametrize("first", [0, 1])
def test_objectnet_takes_imagenets_labels_by_its_own_mappings(
    tmp_path: Path, disc: Callable[[str, int], bytes], first: int
):
    root, known = objectnet(tmp_path / "on", disc, first), find_set("objectnet-1000")
    made = convert_imagefolder(root, tmp_path / "set", Words(known))
    evalset = open_set("objectnet-1000", made.folder, "multilabel", "openai", known=known)
    assert [one.labels for one in evalset.samples] == [(3, 7)]
    (root / "mappings" / "imagenet_to_label_2012_v2").unlink()
    with pytest.raises(InputError, match="four files of mappings"):
        convert_imagefolder(root, tmp_path / "other", Words(known))


def test_long_texts_come_as_a_folder_of_files_or_a_list_with_splits(
    tmp_path: Path, disc: Callable[[str, int], bytes]
):
    image, caption = tmp_path / "Urban1k" / "image", tmp_path / "Urban1k" / "caption"
    image.mkdir(parents=True)
    caption.mkdir()
    rows = []
    for number in (1, 2, 10):
        (image / f"{number}.jpg").write_bytes(disc("red", number))
        (caption / f"{number}.txt").write_text(f"a long text of {number}\nin two lines")
        split = "test" if number < 10 else "train"
        rows.append({"split": split, "image_file": f"{number}.jpg", "description": f"of {number}"})
    made = convert_captions(caption, image, tmp_path / "urban")
    texts = {one.captions for one in open_set("urban1k", made.folder, "retrieval").samples}
    assert texts == {(f"a long text of {n}\nin two lines",) for n in (1, 2, 10)}
    listing = tmp_path / "docci_descriptions.jsonlines"
    listing.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = convert_captions(listing, image, tmp_path / "docci")
    evalset = open_set("docci", made.folder, "retrieval", known=find_set("docci"))
    assert [one.captions for one in evalset.samples] == [("of 1",), ("of 2",)]


def test_f1_is_scikit_learns_over_the_classes_that_occur():
    draw = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 6, (200,), generator=draw).clamp_max(4)
    said = torch.where(torch.rand(200, generator=draw) < 0.6, labels, (labels + 1) % 7)
    ours = f1_macro(torch.stack([said, labels], 1), torch.ones(1, 200, dtype=torch.float64))
    expected = f1_score(labels, said, average="macro", labels=labels.unique())
    assert float(ours) == pytest.approx(expected)


def test_the_worst_group_is_compared_and_has_an_interval():
    evalset = class_set([0, 1] * 20, ["a", "b"])
    samples = tuple(replace(s, group=n % 4 // 2 * 7) for n, s in enumerate(evalset.samples))
    evalset = replace(evalset, samples=samples)
    good = [0, 1] * 20
    bad = [0, 1, 0, 0] * 10  # half of the second group is wrong
    a, b = (Scored(evalset, classes=answered(evalset, said)) for said in (good, bad))
    figures = compute_figures(b)
    assert figures["worst_group_top1"] == 0.5
    low, high = figures["intervals"]["worst_group_top1"]
    assert low < 0.5 < high
    assert compare_models(a, b)["worst_group_top1"].difference == 0.5
    assert "worst_group_top1" not in compute_figures(
        Scored(class_set([0, 1], "ab"), classes=answered(class_set([0, 1], "ab"), [0, 1]))
    )


def test_groups_are_read_beside_the_labels(tmp_path: Path, write, disc):
    vector = tmp_path / "v.npy"
    np.save(vector, np.array([3, 2016, 1]))
    members = [("k.png", disc("red", 1)), ("k.cls", b"0"), ("k.npy", vector.read_bytes())]
    folder = write(
        tmp_path / "fmow", [members], classnames="a\n", zeroshot_classification_templates="{c}\n"
    )
    assert open_set("fmow", folder, "classification").samples[0].group == 3


def test_datacomps_average_is_of_38_main_figures_or_names_what_is_missing():
    keys = sets_of_group(DATACOMP)
    assert len(keys) == len(set(keys)) == 38
    values = {"top1": 0.5, "mean_per_class": 0.25, "f1_macro": 0.5, "jaccard_10": 0.5}
    values |= {"worst_group_top1": 0.5, "worst_group_top5": 0.5}
    values |= {"image_to_text_r1": 0.75, "text_to_image_r1": 0.25}
    results = {key: {"m": values} for key in keys}
    whole = _average_datacomp(results, "m")
    assert whole.value == pytest.approx(100 * (34 * 0.5 + 4 * 0.25) / 38)
    part = _average_datacomp({key: one for key, one in results.items() if key != "fmow"}, "m")
    assert part.value is None and part.missing == ("fmow",)
    config = EvaluateConfig.from_mapping({"sets": "datacomp38"}, "here")
    assert tuple(one.name for one in config.sets) == keys
    with pytest.raises(InputError, match="one of paper, datacomp38"):
        EvaluateConfig.from_mapping({"sets": "datacomp"}, "here")


def test_score_takes_the_sets_of_a_group_that_are_there(
    tmp_path: Path, classification: Path, saved_model: Callable[[int], Path]
):
    asked = (("m=" + str(saved_model(1)),), "", ["datacomp38"])
    with pytest.raises(InputError, match="none of the 38 sets"):
        read_asked(*asked, str(tmp_path), (), tmp_path)
    classification.rename(tmp_path / "wds_cifar10_test")
    assert set(read_asked(*asked, str(tmp_path), (), tmp_path).sets) == {"cifar10"}
