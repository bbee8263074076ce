"""torchvision's sets: the table against torchvision's own classes, and real ones converted."""

from __future__ import annotations

import inspect
import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaclip_model.errors import InputError
from tasks.evaluate.sets.convert.convert import (
    Words,
    convert_torchvision,
    open_torchvision,
    torchvision_names,
)
from tasks.evaluate.sets.published_layout import open_set
from tasks.evaluate.sets.set_registry import find_set, known_sets
from tests.evaclip_model.peer_torchvision import torchvision

datasets = torchvision.datasets

OWN = {"templates": "none"}


def image(seed: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (28, 28, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


TORCHVISION = {key: one.torchvision for key, one in known_sets().items() if one.torchvision}


def test_the_registry_has_torchvisions_19_sets() -> None:
    assert len(TORCHVISION) == 19


@pytest.mark.parametrize("key", TORCHVISION)
def test_torchvisions_class_takes_the_arguments_of_the_table(key: str) -> None:
    entry = TORCHVISION[key]
    dataset = getattr(datasets, entry.dataset)
    taken = set(inspect.signature(dataset.__init__).parameters)
    if "kwargs" in taken:  # ImageNet hands the rest to ImageFolder, MNIST's kind has none
        taken |= set(inspect.signature(datasets.ImageFolder.__init__).parameters)
    assert {"root", *dict(entry.arguments)} <= taken
    assert ("loader" in taken) == entry.reads_files
    assert ("download" in taken) == entry.downloads or key in ("stanford-cars",)


def write_mnist(root: Path, count: int) -> None:
    """MNIST's two files for testing, in its own format."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    pixels = b"".join(np.asarray(image(n, "L")).tobytes() for n in range(count))
    labels = bytes(n % 10 for n in range(count))
    for part in ("train", "t10k"):
        head = struct.pack(">4i", 2051, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + pixels)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels)


def test_mnist_is_converted_pixel_by_pixel(tmp_path: Path) -> None:
    write_mnist(tmp_path, 12)
    known = find_set("mnist")
    made = convert_torchvision(known, tmp_path, tmp_path / "set", Words(known, **OWN))
    found = open_set("mnist", made.folder, "classification", ("{c}",), known=known)
    assert found.classnames == tuple("0123456789")
    assert [sample.label for sample in found.samples] == [n % 10 for n in range(12)]
    for number, sample in enumerate(found.samples):
        with Image.open(io.BytesIO(sample.image.read())) as read:
            assert read.mode == "L"
            assert np.array_equal(np.asarray(read), np.asarray(image(number, "L")))
    assert found.warnings == ("12 images, where the known set has 10,000",)


def test_dtds_files_are_copied_as_they_are(tmp_path: Path) -> None:
    names = ("banded", "blotchy", "zigzagged")
    lines = []
    for number, name in enumerate(names * 2):
        path = tmp_path / "dtd" / "dtd" / "images" / name / f"{name}_{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image(number).save(path)
        lines.append(f"{name}/{path.name}")
    labels = tmp_path / "dtd" / "dtd" / "labels"
    labels.mkdir()
    (labels / "test1.txt").write_text("\n".join(lines) + "\n")
    known = find_set("dtd")
    made = convert_torchvision(known, tmp_path, tmp_path / "set", Words(known, **OWN))
    found = open_set("dtd", made.folder, "classification", ("{c}",), known=known)
    assert found.classnames == names
    assert [sample.label for sample in found.samples] == [0, 1, 2, 0, 1, 2]
    for line, sample in zip(lines, found.samples, strict=True):
        original = tmp_path / "dtd" / "dtd" / "images" / line
        assert sample.image.read() == original.read_bytes()


def test_sun397s_names_have_spaces(tmp_path: Path) -> None:
    root = tmp_path / "SUN397"
    names = ("/a/abbey", "/a/apartment_building/outdoor")
    for number, name in enumerate(names):
        path = root / name[1:] / f"sun_{number}.jpg"
        path.parent.mkdir(parents=True)
        image(number).save(path)
    (root / "ClassName.txt").write_text("\n".join(names) + "\n")
    known = find_set("sun397")
    dataset = open_torchvision(known, tmp_path)
    assert torchvision_names(known, dataset) == ("abbey", "apartment building outdoor")


def test_fer2013s_labels_are_put_in_the_order_of_its_names(tmp_path: Path) -> None:
    pytest.importorskip("clip_benchmark")
    known = find_set("fer2013")
    names = torchvision_names(known, None)
    labels = ("angry", "disgusted", "fearful", "happy", "sad", "surprised", "neutral")
    assert [names[TORCHVISION["fer2013"].relabel[n]] for n in range(7)] == list(labels)


def test_files_that_are_not_there_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"torchvision's DTD in .*: Dataset not found"):
        open_torchvision(find_set("dtd"), tmp_path)
    with pytest.raises(InputError, match="torchvision has no set 'objectnet'; it has imagenet1k"):
        open_torchvision(find_set("objectnet"), tmp_path)
    with pytest.raises(InputError, match="torchvision does not download 'stanford-cars'"):
        open_torchvision(find_set("stanford-cars"), tmp_path, download=True)
