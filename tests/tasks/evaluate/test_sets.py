"""Reading the published layout: the index, its checks, its bytes, its fingerprint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from evaclip_model.errors import InputError
from tasks.evaluate.sets import open_set


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


def test_a_sample_that_occurs_in_two_tars_is_refused(tmp_path: Path, write: Callable[..., Path]):
    members = [("a.webp", b"x"), ("a.cls", b"0")]
    folder = write(tmp_path / "twice", [members, members], classnames="x\n")
    with pytest.raises(InputError, match="sample a occurs twice"):
        open_set("twice", folder, "classification", ("{c}",))
