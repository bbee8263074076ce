"""`evalsets` as a person types it."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from flows.__main__ import main
from tasks.evaluate.sets.set_registry import all_sets, find_set
from tests.tasks.evaluate.all_sets import write_known_set


def evalsets(*words: object) -> int:
    return main(["evalsets", *map(str, words)])


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    """Two classes of two images, one of them twice, and a file that is no image."""
    for place, name in enumerate(("cat", "dog")):
        (tmp_path / "animals" / name).mkdir(parents=True)
        for number in range(2):
            colour = (90 * place, 90 * number * place, 0)
            Image.new("RGB", (20, 20), colour).save(tmp_path / "animals" / name / f"{number}.png")
    (tmp_path / "animals" / "dog" / "2.jpg").write_text("no image")
    (tmp_path / "templates.txt").write_text("a photo of a {c}.\n")
    return tmp_path / "animals"


def test_every_set_is_listed_and_those_that_are_here_are_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evaluation" / find_set("dtd").wds).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert evalsets("list") == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert set(rows) == {"name", *all_sets()}
    assert rows["dtd"].split()[-1] == "yes"
    assert rows["pcam"].split()[-1] == "32,768"


def test_all_that_is_known_of_a_set_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert evalsets("show", "objectnet") == 0
    shown = capsys.readouterr().out
    assert "of 50,273: the images of the 113 classes that ImageNet shares" in shown
    assert "must never be trained on" in shown
    assert "None" not in shown
    assert evalsets("show", "objectnets") == 2
    assert "did you mean 'objectnet'?" in capsys.readouterr().err


def test_a_folder_of_images_is_converted_and_checked(
    animals: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = animals.parent / "set"
    templates = ("--templates", animals.parent / "templates.txt")
    assert evalsets("convert", "imagefolder", animals, folder, *templates) == 0
    shown = capsys.readouterr().out
    assert "✓ 4 images in 1 tars" in shown
    assert "! 1 gave no image, all in" in shown
    assert evalsets("check", folder) == 0
    shown = capsys.readouterr().out
    assert "4 in 1 tars" in shown
    assert "2: cat, dog" in shown
    assert "1 images are copies of others, byte by byte" in shown


def test_a_mistake_is_one_sentence(animals: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = animals.parent / "set"
    assert evalsets("convert", "imagefolder", animals, folder) == 2
    assert "which prompt templates has this set?" in capsys.readouterr().err
    assert evalsets("convert", "imagefolder", animals, folder, "--as", "pets") == 2
    assert "has 2 classes, but Oxford-IIIT Pets has 37" in capsys.readouterr().err
    assert evalsets("convert", "videos", animals, folder, "--templates", "none") == 2
    assert "has no video in its folders" in capsys.readouterr().err
    (animals.parent / "taken").touch()
    taken = animals.parent / "taken"
    assert evalsets("convert", "imagefolder", animals, taken, "--templates", "none") == 2
    assert f"Not a directory: '{taken}'" in capsys.readouterr().err
    assert evalsets("convert", "captions", "no.json", animals, folder) == 2
    assert "no.json is missing" in capsys.readouterr().err
    assert evalsets("check", animals) == 2
    assert "is not an evaluation set" in capsys.readouterr().err
    assert not folder.exists()


def test_what_is_odd_about_a_known_set_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_known_set(tmp_path / "coco", find_set("coco"))
    assert evalsets("check", folder, "--as", "coco") == 0
    shown = capsys.readouterr().out
    assert "244 captions, where the known set has 25,010" in shown
    assert "captions belong to several images word for word: exact ties" in shown
    folder = write_known_set(tmp_path / "r", find_set("ucf101"))
    assert evalsets("check", folder, "--as", "ucf101") == 0
    shown = capsys.readouterr().out
    assert "48 (grammar): a photo of a person {c}." in shown
    assert "the paper does not say which images these are" in shown


def test_an_image_that_cannot_be_decoded_makes_a_set_unfit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_known_set(tmp_path / "set", find_set("stl10"), images=4)
    tar = folder / "test" / "0.tar"
    content = tar.read_bytes()
    tar.write_bytes(content.replace(b"RIFF", b"RAFF").replace(b"PNG", b"GNP"))
    assert evalsets("check", folder) == 2
    said = capsys.readouterr()
    assert "1 images cannot be decoded: s0000000 (" in said.out
    assert "every image has to be decodable" in said.err


def test_names_with_brackets_are_printed_as_they_are(
    animals: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (animals / "dog").rename(animals / "dog[")
    (animals / "dog[" / "1.png").rename(animals / "dog[" / "b].png")
    (animals.parent / "names.txt").write_text("cat\n[red]dog_[/red]\n")
    folder = animals.parent / "a [bold]set"
    words = ("--templates", "openai", "--classnames", animals.parent / "names.txt")
    assert evalsets("convert", "imagefolder", animals, folder, *words) == 0
    shown = capsys.readouterr().out
    assert f"4 images in 1 tars: {folder}" in shown
    assert "'dog[' was given the one name that is left, '[red]dog_[/red]'" in shown
    assert f"all in {folder / 'failures.txt'}" in shown
    assert evalsets("check", folder, "--templates", "openai") == 0
    odd = "1 names have an underscore, which a text tower reads as they stand: [red]dog_[/red]"
    assert odd in capsys.readouterr().out


def test_a_source_of_templates_that_does_not_exist_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_known_set(tmp_path / "set", find_set("stl10"), images=4)
    assert evalsets("check", folder, "--as", "stl10", "--templates", "clip-benchmark") == 2
    said = capsys.readouterr().err
    assert (
        "'clip-benchmark' is not a source of prompt templates: give one of dataset, openai" in said
    )
