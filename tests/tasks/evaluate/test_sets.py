"""Reading the published layout: the index, its checks, its bytes, its fingerprint."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaclip_model.errors import InputError
from evaclip_model.reading.image_decoder import decode_image
from evaclip_model.zeroshot.imagenet_prompts import imagenet_classnames
from tasks.evaluate.config import EvalSetConfig
from tasks.evaluate.sets.prompts import subset_classes
from tasks.evaluate.sets.published_layout import open_set
from tasks.evaluate.sets.set_registry import find_set, known_sets
from tests.tasks.evaluate.all_sets import write_all_sets, write_known_set


def test_every_sample_of_every_tar_is_indexed_once_and_its_bytes_are_the_members(
    classification: Path, disc: Callable[[str, int], bytes]
):
    found = open_set("colours", classification, "classification")
    assert [sample.key for sample in found.samples] == [f"s{n:07d}" for n in range(12)]
    assert [sample.label for sample in found.samples] == [n % 4 for n in range(12)]
    assert found.samples[9].image.tar.name == "1.tar"
    assert found.samples[9].image.read() == disc("green", 9)
    assert found.classnames == ("red disc", "green disc", "blue disc", "yellow disc")
    assert found.templates == ("a photo of a {c}.", "{c}")


def test_captions_are_one_a_line_and_may_hold_an_escaped_newline(retrieval: Path):
    found = open_set("discs", retrieval, "retrieval")
    assert found.samples[0].captions == ("a red disc, number 0", "the same\nthing")
    assert found.samples[1].captions == ("a green disc, number 1",)


def test_templates_of_the_recipe_replace_the_sets_own(classification: Path):
    (classification / "zeroshot_classification_templates.txt").unlink()
    assert open_set("c", classification, "classification", ("{c}!",)).templates == ("{c}!",)
    with pytest.raises(InputError, match=r"templates\.txt is missing"):
        open_set("c", classification, "classification")


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(
    classification: Path, tmp_path: Path
):
    copy = shutil.copytree(classification, tmp_path / "elsewhere")
    first, again = (open_set("c", folder, "classification") for folder in (classification, copy))
    assert again.fingerprint == first.fingerprint
    (copy / "classnames.txt").write_text("green disc\nred disc\nblue disc\nyellow disc\n")
    renamed = open_set("c", copy, "classification")
    assert renamed.fingerprint != first.fingerprint
    assert renamed.images_digest == first.images_digest


def test_a_missing_tar_is_named(classification: Path):
    (classification / "test" / "1.tar").unlink()
    with pytest.raises(InputError, match=r"1\.tar is missing: .*nshards\.txt says there are 2"):
        open_set("c", classification, "classification")


@pytest.mark.parametrize("keep", [100, 700, 5_000])
def test_a_tar_cut_short_is_refused(classification: Path, keep: int):
    tar = classification / "test" / "0.tar"
    tar.write_bytes(tar.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"0\.tar cannot be read as a tar"):
        open_set("c", classification, "classification")


def test_a_label_without_a_class_name_is_refused(classification: Path):
    (classification / "classnames.txt").write_text("red disc\ngreen disc\nblue disc\n")
    with pytest.raises(InputError, match=r"s0000003 has label 3, but .* names 3 classes"):
        open_set("c", classification, "classification")


def test_a_blank_line_among_class_names_is_refused_because_it_shifts_labels(classification: Path):
    (classification / "classnames.txt").write_text("red disc\n\ngreen disc\nblue disc\nyellow\n")
    with pytest.raises(InputError, match="has an empty line"):
        open_set("c", classification, "classification")


def test_the_kind_in_the_recipe_must_be_the_kind_of_the_set(classification: Path, retrieval: Path):
    with pytest.raises(InputError, match="is a classification set"):
        open_set("c", classification, "retrieval")
    with pytest.raises(InputError, match="is a retrieval set"):
        open_set("d", retrieval, "classification")


def test_a_folder_that_is_no_set_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"nshards\.txt is missing"):
        open_set("nothing", tmp_path, "classification")


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ([("a.webp", b"x")], r"sample a has no \.cls"),
        ([("a.cls", b"0")], "sample a has 0 images"),
        ([("a.webp", b"x"), ("a.png", b"x"), ("a.cls", b"0")], "sample a has 2 images"),
        ([("a.webp", b"x"), ("a.cls", b"zero")], "must hold a class number, got 'zero'"),
        ([("a.webp", b"x"), ("a.webp", b"y"), ("a.cls", b"0")], "occurs twice"),
        ([], "has no sample"),
    ],
)
def test_an_incomplete_sample_is_named(
    tmp_path: Path, write: Callable[..., Path], members: list[tuple[str, bytes]], complaint: str
):
    folder = write(
        tmp_path / "odd", [members], classnames="x\n", zeroshot_classification_templates="{c}\n"
    )
    with pytest.raises(InputError, match=complaint):
        open_set("odd", folder, "classification")


def test_images_of_every_form_that_training_reads_are_read(
    tmp_path: Path, write: Callable[..., Path], disc: Callable[[str, int], bytes]
):
    texts = {"classnames": "x\n", "zeroshot_classification_templates": "{c}\n"}
    members = [
        ("a.TIF", disc("red", 1)),
        ("a.cls", b"0"),
        ("b.gif", disc("red", 2)),
        ("b.cls", b"0"),
    ]
    found = open_set("c", write(tmp_path / "c", [members], **texts), "classification")
    assert [sample.key for sample in found.samples] == ["a", "b"]


def test_what_macos_and_pax_add_to_a_tar_is_no_sample(
    tmp_path: Path, write: Callable[..., Path], disc: Callable[[str, int], bytes]
):
    texts = {"classnames": "x\n", "zeroshot_classification_templates": "{c}\n"}
    members = [("./a.webp", disc("red", 1)), ("./a.cls", b"0")]
    added = [
        ("./._a.webp", b"attributes"),
        ("./._a.cls", b"attributes"),
        ("__MACOSX/._a.webp", b"attributes"),
        ("PaxHeader/a.webp", b"30 mtime=1"),
        ("./PaxHeaders.12/a.cls", b"30 mtime=1"),
        (".DS_Store", b"x"),
    ]
    plain = write(tmp_path / "plain", [members], **texts)
    from_mac = write(tmp_path / "mac", [[*added, *members]], **texts)
    first, other = (open_set("c", folder, "classification") for folder in (plain, from_mac))
    assert [sample.key for sample in other.samples] == ["a"]
    assert other.fingerprint == first.fingerprint


@pytest.mark.parametrize("label", [b"9" * 5000, "\u0663".encode(), b"-1", b"1.5", b""])
def test_a_label_that_is_no_short_number_is_refused(
    tmp_path: Path, write: Callable[..., Path], label: bytes
):
    folder = write(tmp_path / "odd", [[("a.webp", b"x"), ("a.cls", label)]], classnames="x\n")
    with pytest.raises(InputError, match=r"a\.cls must hold a class number"):
        open_set("odd", folder, "classification", ("{c}",))


def test_a_number_of_tars_takes_no_memory_before_the_tars_are_there(classification: Path):
    for count in ("3000000000", "9" * 5000):
        (classification / "test" / "nshards.txt").write_text(count)
        with pytest.raises(InputError, match=r"2\.tar is missing|must hold one number"):
            open_set("c", classification, "classification")


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        "{'descr': [('a', '<i4'), ('b', '<i4')], 'fortran_order': False, 'shape': (1,), }",
        pytest.param(
            "{'descr': '<i8', 'fortran_order': False, 'shape': " + "(" * 4000, id="nested"
        ),
        "{'descr': '<i8', 'fortran_order': False, 'shape': (-1,), }",
    ],
)
def test_a_vector_whose_header_lies_is_refused(
    tmp_path: Path, write: Callable[..., Path], header: str
):
    text = header.encode() + b" " * (63 - (9 + len(header)) % 64) + b"\n"
    content = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(8)
    members = [("s0.webp", b"x"), ("s0.npy", content)]
    folder = write(tmp_path / "odd", [members], dataset_type="multilabel", classnames="x\n")
    with pytest.raises(InputError, match=r"s0\.npy (cannot be read as a vector|must hold one 0)"):
        open_set("odd", folder, "multilabel", ("{c}",))


def test_a_sample_that_occurs_in_two_tars_is_refused(tmp_path: Path, write: Callable[..., Path]):
    members = [("a.webp", b"x"), ("a.cls", b"0")]
    folder = write(tmp_path / "twice", [members, members], classnames="x\n")
    with pytest.raises(InputError, match="sample a occurs twice"):
        open_set("twice", folder, "classification", ("{c}",))


def test_the_same_samples_are_the_same_set_in_however_many_tars(
    tmp_path: Path, write: Callable[..., Path], disc: Callable[[str, int], bytes]
):
    samples = [
        [(f"s{n:07d}.webp", disc("red", n)), (f"s{n:07d}.cls", str(n % 2).encode())]
        for n in range(21)
    ]
    texts = {"classnames": "a\nb\n", "zeroshot_classification_templates": "{c}\n"}
    one = write(tmp_path / "one", [[*chain(*samples)]], **texts)
    seven = write(tmp_path / "seven", [[*chain(*samples[i::7])] for i in range(7)], **texts)
    first, other = (open_set("c", folder, "classification") for folder in (one, seven))
    assert [s.key for s in other.samples] == [s.key for s in first.samples]
    assert [s.image.read() for s in other.samples] == [s.image.read() for s in first.samples]
    assert other.fingerprint == first.fingerprint
    assert other.images_digest == first.images_digest


def test_answers_decide_the_fingerprint_and_not_the_digest_of_images(
    tmp_path: Path, write: Callable[..., Path], disc: Callable[[str, int], bytes]
):
    opened = []
    for label in (b"0", b"1"):
        members = [("a.webp", disc("red", 1)), ("a.cls", label)]
        folder = write(tmp_path / label.decode(), [members], classnames="x\ny\n")
        opened.append(open_set("c", folder, "classification", ("{c}",)))
    assert opened[0].fingerprint != opened[1].fingerprint
    assert opened[0].images_digest == opened[1].images_digest


def test_a_crop_makes_it_another_set_of_images(classification: Path):
    whole = open_set("c", classification, "classification")
    cut = open_set("c", classification, "classification", crop_px=2)
    assert cut.crop_px == 2
    assert cut.fingerprint != whole.fingerprint
    assert cut.images_digest != whole.images_digest


def test_a_multilabel_set_has_the_classes_of_each_image(
    tmp_path: Path, write: Callable[..., Path], disc: Callable[[str, int], bytes]
):
    members = []
    for number, vector in enumerate(([0, 1, 1], [0, 0, 0], [1, 0, 0])):
        members.append((f"s{number}.webp", disc("red", number)))
        members.append((f"s{number}.npy", npy(np.array(vector))))
    folder = write(
        *(tmp_path / "several", [members]),
        dataset_type="multilabel\n",
        classnames="cat\ndog\nsofa\n",
        zeroshot_classification_templates="a {c}\n",
    )
    found = open_set("several", folder, "multilabel")
    assert [sample.labels for sample in found.samples] == [(1, 2), (), (0,)]
    (folder / "classnames.txt").write_text("cat\ndog\n")
    with pytest.raises(InputError, match=r"s0\.npy is for 3 classes, but .* names 2"):
        open_set("several", folder, "multilabel")


def test_a_multilabel_set_without_any_class_is_refused(
    tmp_path: Path, write: Callable[..., Path], disc: Callable[[str, int], bytes]
):
    members = [("a.webp", disc("red", 1)), ("a.npy", npy(np.array([0, 0])))]
    folder = write(
        *(tmp_path / "none", [members]), dataset_type="multilabel", classnames="cat\ndog\n"
    )
    with pytest.raises(InputError, match=r"'none': no image in \S+ has a class"):
        open_set("none", folder, "multilabel", ("a {c}",))


def test_a_kind_that_is_not_text_is_refused(classification: Path):
    (classification / "dataset_type.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="must hold one of classification, multilabel, retrieval"):
        open_set("c", classification, "classification")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"1 0 1", "cannot be read as a vector"),
        (b"", "cannot be read as a vector"),
        ([0, 2, 1], "must hold one 0 or 1 a class"),
        ([[0, 1]], "must hold one 0 or 1 a class"),
    ],
)
def test_a_vector_that_is_none_is_named(
    tmp_path: Path, write: Callable[..., Path], content: Any, complaint: str
):
    data = content if isinstance(content, bytes) else npy(np.array(content))
    members = [("s0.webp", b"x"), ("s0.npy", data)]
    folder = write(tmp_path / "odd", [members], dataset_type="multilabel", classnames="x\n")
    with pytest.raises(InputError, match=rf"s0\.npy {complaint}"):
        open_set("odd", folder, "multilabel", ("{c}",))


def test_an_unknown_kind_of_set_is_refused(classification: Path):
    (classification / "dataset_type.txt").write_text("segmentation\n")
    with pytest.raises(InputError, match="must hold one of classification, multilabel, retrieval"):
        open_set("c", classification, "classification")


def test_a_kept_index_is_used_without_reading_the_tars(classification: Path, tmp_path: Path):
    first = open_set("c", classification, "classification", index_cache=tmp_path / "index")
    for number in range(2):
        tar = classification / "test" / f"{number}.tar"
        times = (tar.stat().st_atime_ns, tar.stat().st_mtime_ns)
        tar.write_bytes(bytes(tar.stat().st_size))
        os.utime(tar, ns=times)
    again = open_set("c", classification, "classification", index_cache=tmp_path / "index")
    assert again == first


def test_an_index_is_made_again_when_a_tar_has_changed(
    classification: Path, tmp_path: Path, disc: Callable[[str, int], bytes]
):
    first = open_set("c", classification, "classification", index_cache=tmp_path / "index")
    tar = classification / "test" / "1.tar"
    other = tar.read_bytes().replace(disc("green", 9), disc("red", 9).ljust(len(disc("green", 9))))
    tar.write_bytes(other)
    os.utime(tar, ns=(0, 1))
    again = open_set("c", classification, "classification", index_cache=tmp_path / "index")
    assert again.fingerprint != first.fingerprint


@pytest.mark.parametrize("damage", ["", "{}", '{"version": 1', "[]"])
def test_a_damaged_index_is_made_again(classification: Path, tmp_path: Path, damage: str):
    first = open_set("c", classification, "classification", index_cache=tmp_path)
    [kept] = tmp_path.glob("*.json")
    kept.write_text(damage)
    assert open_set("c", classification, "classification", index_cache=tmp_path) == first
    assert kept.read_text() != damage


def test_what_differs_from_the_known_set_is_a_warning_and_no_failure(tmp_path: Path):
    folder = write_known_set(tmp_path / "cars", find_set("stanford-cars"))
    found = open_set("stanford-cars", folder, "classification", known=find_set("stanford-cars"))
    assert found.warnings == ("48 images, where the known set has 8,041",)
    (folder / "classnames.txt").write_text("car\n" * 197)
    (folder / "zeroshot_classification_templates.txt").write_text("{c}\n")
    found = open_set("stanford-cars", folder, "classification", known=find_set("stanford-cars"))
    assert found.warnings[1:] == (
        "197 classes, where the known set has 196",
        "1 templates, where the known set has 8",
    )


def test_captions_that_were_cut_to_five_are_noticed(tmp_path: Path):
    folder = write_known_set(tmp_path / "coco", find_set("coco"))
    found = open_set("coco", folder, "retrieval", known=find_set("coco"))
    assert found.warnings[1] == "244 captions, where the known set has 25,010"


def test_a_subset_of_imagenet_may_come_with_its_200_names(tmp_path: Path):
    known = find_set("imagenet-r")
    folder = write_known_set(tmp_path / "r", known)
    own = open_set("imagenet-r", folder, "classification", known=known)
    assert len(own.classnames) == 200
    assert max(sample.label for sample in own.samples) < 200
    named = open_set("imagenet-r", folder, "classification", known=known, classnames="openai")
    assert named.classnames == own.classnames
    assert named.prompts_source == "dataset, class names openai"


def test_a_subset_of_imagenet_with_the_thousands_names_and_labels_is_cut(
    tmp_path: Path, write: Callable[..., Path], disc: Callable[[str, int], bytes]
):
    known = find_set("imagenet-a")
    classes = subset_classes(known)
    members = []
    for number, place in enumerate((0, 17, 199)):
        members.append((f"s{number}.webp", disc("red", number)))
        members.append((f"s{number}.cls", str(classes[place]).encode()))
    folder = write(tmp_path / "a", [members], classnames="\n".join(imagenet_classnames()))
    found = open_set("imagenet-a", folder, "classification", ("{c}",), known=known)
    assert [sample.label for sample in found.samples] == [0, 17, 199]
    assert found.classnames[17] == imagenet_classnames()[classes[17]]
    assert len(found.classnames) == 200
    other = next(label for label in range(1000) if label not in classes)
    members[1] = ("s0.cls", str(other).encode())
    write(folder, [members])
    with pytest.raises(InputError, match=f"label {other}, which is not one of the 200 classes"):
        open_set("imagenet-a", folder, "classification", ("{c}",), known=known)


def test_a_subset_of_imagenet_with_another_number_of_names_is_refused(tmp_path: Path):
    known = find_set("imagenet-a")
    folder = write_known_set(tmp_path / "a", known)
    (folder / "classnames.txt").write_text("x\n" * 199)
    with pytest.raises(InputError, match="has 200 classes, but 199 class names"):
        open_set("imagenet-a", folder, "classification", known=known)


def test_every_known_set_is_read_with_its_own_classes_and_templates(tmp_path: Path):
    keys = [*known_sets(), "voc2007-multilabel"]
    for key, folder in write_all_sets(tmp_path, keys=keys, images=12).items():
        known = find_set(key)
        config = EvalSetConfig(name=key)
        found = open_set(key, folder, config.kind, config.templates, known=known)
        assert len(found) == 12
        assert len(found.classnames) == (known.classes or 0)
        assert len(found.templates) == (known.templates or 0)
        for sample in found.samples:
            decode_image(sample.image.read())


def npy(vector: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, vector)
    return out.getvalue()
