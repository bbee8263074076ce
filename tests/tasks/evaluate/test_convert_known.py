"""Sets whose sources have a form of their own: ObjectNet's folders and VOC's boxes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaclip_model.errors import InputError
from flows.__main__ import main
from tasks.evaluate.sets.convert.convert import Words, convert_imagefolder, convert_voc
from tasks.evaluate.sets.published_layout import EvalSet, open_set
from tasks.evaluate.sets.set_registry import find_set

OWN = Words(templates="none")


def noise(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 60, 3), np.uint8)
    return Image.fromarray(pixels)


def pixels_of(evalset: EvalSet, index: int) -> np.ndarray:
    with Image.open(io.BytesIO(evalset.samples[index].image.read())) as image:
        return np.asarray(image)


@pytest.fixture
def objectnet(tmp_path: Path) -> Path:
    """Three folders of ObjectNet's form; ImageNet has two of their classes."""
    root = tmp_path / "objectnet-1.0"
    labels = {"alarm_clock": "Alarm clock", "air_freshener": "Air freshener", "basket": "Basket"}
    for number, folder in enumerate(labels):
        (root / "images" / folder).mkdir(parents=True)
        noise(number).save(root / "images" / folder / "a.png")
    (root / "mappings").mkdir()
    (root / "mappings" / "folder_to_objectnet_label.json").write_text(json.dumps(labels))
    shared = {"Alarm clock": "analog clock; digital clock", "Basket": "shopping basket"}
    (root / "mappings" / "objectnet_to_imagenet_1k.json").write_text(json.dumps(shared))
    return root


def test_of_objectnet_the_classes_that_imagenet_has_too_are_taken(
    objectnet: Path, tmp_path: Path
) -> None:
    words = Words(find_set("objectnet"), templates="none")
    made = convert_imagefolder(objectnet, tmp_path / "set", words)
    found = open_set("objectnet", made.folder, "classification", "openai")
    assert found.classnames == ("alarm clock", "basket")
    assert [sample.label for sample in found.samples] == [0, 1]
    assert np.array_equal(pixels_of(found, 0), np.asarray(noise(0)))


def test_another_folder_than_objectnets_is_refused(objectnet: Path, tmp_path: Path) -> None:
    words = Words(find_set("objectnet"), templates="none")
    with pytest.raises(InputError, match=r"is not ObjectNet's folder \(.*No such file"):
        convert_imagefolder(tmp_path, tmp_path / "set", words)
    (objectnet / "images" / "basket" / "a.png").unlink()
    (objectnet / "images" / "basket").rmdir()
    with pytest.raises(InputError, match="basket is missing: unpack all of ObjectNet's images"):
        convert_imagefolder(objectnet, tmp_path / "set", words)


def annotation(*boxes: tuple[str, int, int, int, int], difficult: int = 0) -> str:
    """A VOC annotation; each object has a part with a box of its own, which does not count."""
    objects = "".join(
        f"<object><name>{name}</name><pose>Left</pose><difficult>{difficult}</difficult><bndbox>"
        f"<xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox>"
        "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax>"
        "</bndbox></part></object>"
        for name, left, top, right, bottom in boxes
    )
    return f"<annotation><filename>x.jpg</filename>{objects}</annotation>"


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Two test images of VOC's form with three boxes, and one that is for training."""
    root = tmp_path / "VOCdevkit" / "VOC2007"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    boxes = {
        "000001": annotation(("dog", 3, 5, 30, 25), ("cat", 10, 0, 60, 40), difficult=1),
        "000002": annotation(("cat", 0, 0, 20, 20)),
        "000003": annotation(("sofa", 0, 0, 20, 20)),
    }
    for number, (name, text) in enumerate(boxes.items()):
        (root / "Annotations" / f"{name}.xml").write_text(text)
        noise(number).save(root / "JPEGImages" / f"{name}.jpg")
    (root / "ImageSets/Main" / "test.txt").write_text("000001\n000002\n")
    (root / "ImageSets/Main" / "trainval.txt").write_text("000003\n")
    for name in ("sofa", "cat", "dog"):
        for split in ("test", "trainval"):
            (root / "ImageSets/Main" / f"{name}_{split}.txt").write_text("000001  1\n")
    return root


def test_every_box_of_vocs_test_images_is_one_image(voc: Path, tmp_path: Path) -> None:
    made = convert_voc(voc, tmp_path / "set", OWN)
    found = open_set("voc2007", made.folder, "classification", ("{c}",))
    assert found.classnames == ("cat", "dog", "sofa")
    assert [sample.label for sample in found.samples] == [1, 0, 0]
    with Image.open(voc / "JPEGImages" / "000001.jpg") as image:
        assert np.array_equal(pixels_of(found, 0), np.asarray(image)[5:25, 3:30])


def test_vocs_test_images_are_whole_with_all_their_classes_too(voc: Path, tmp_path: Path) -> None:
    made = convert_voc(voc, tmp_path / "set", OWN, whole=True)
    found = open_set("voc", made.folder, "multilabel", ("{c}",))
    assert [sample.labels for sample in found.samples] == [(0, 1), (0,)]
    original = (voc / "JPEGImages" / "000002.jpg").read_bytes()
    assert found.samples[1].image.read() == original


def test_what_is_not_as_voc_has_it_is_one_sentence(voc: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no ImageSets/Main/\*_test\.txt"):
        convert_voc(tmp_path, tmp_path / "set", OWN)
    (voc / "Annotations" / "000001.xml").write_text(annotation(("horse", 0, 0, 1, 1)))
    with pytest.raises(InputError, match="class 'horse' is not one of cat, dog, sofa"):
        convert_voc(voc, tmp_path / "set", OWN)
    for text in ("<annotation>", "<annotation><object><name>cat</name></object></annotation>"):
        (voc / "Annotations" / "000001.xml").write_text(text)
        with pytest.raises(InputError, match="is not an annotation of VOC's form"):
            convert_voc(voc, tmp_path / "set", OWN)
    (voc / "Annotations" / "000001.xml").unlink()
    with pytest.raises(InputError, match=r"000001\.xml is missing: expected the boxes"):
        convert_voc(voc, tmp_path / "set", OWN)


def test_voc_is_converted_by_command(
    voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    command = ["evalsets", "convert", "voc", str(voc), str(out), "--templates", "openai", "--whole"]
    assert main(command) == 0
    assert "2 images in 1 tars" in capsys.readouterr().out
    assert (out / "dataset_type.txt").read_text() == "multilabel\n"
