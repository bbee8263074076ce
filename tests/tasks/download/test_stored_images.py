"""What is stored of an image: upright, 8 bits, on white, and the file itself where that is so."""

from __future__ import annotations

import io
import os

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # img2dataset imports it, and it would ask the net

import numpy as np
import pytest
from img2dataset.resizer import Resizer
from PIL import Image

from tasks.download.config import DownloadConfig
from tasks.download.fetch_outcome import Outcome, outcome_of
from tasks.download.img2dataset_adapter import BoundedResizer

RED = (250, 10, 10)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def store(data: bytes, **settings: object) -> tuple:
    storage = {name: settings.pop(name) for name in list(settings) if name.startswith("encode_")}
    config = DownloadConfig(image_px=32, storage=storage, **settings)
    resizer = Resizer(
        image_size=config.image_px,
        resize_mode=config.storage.resize_mode,
        resize_only_if_bigger=True,
        encode_format=config.storage.encode_format,
        encode_quality=config.storage.encode_quality,
        skip_reencode=True,
    )
    return BoundedResizer(resizer, config)(io.BytesIO(data))


def test_a_small_jpeg_is_stored_as_it_is():
    data = encoded(Image.new("RGB", (30, 20), RED), "JPEG")
    assert store(data) == (data, 30, 20, 30, 20, None)


def test_a_large_jpeg_is_resized():
    stored, *sides, error = store(encoded(Image.new("RGB", (90, 60), RED), "JPEG"))
    assert (sides, error) == ([48, 32, 90, 60], None)
    assert np.abs(np.asarray(Image.open(io.BytesIO(stored))) - np.array(RED)).max() < 6


def test_a_grey_jpeg_stays_grey():
    stored = store(encoded(Image.new("L", (90, 60), 99), "JPEG"))[0]
    assert Image.open(io.BytesIO(stored)).mode == "L"


def test_a_small_photograph_that_was_turned_is_encoded_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (30, 20), RED), "JPEG", exif=exif)
    stored, *sides, error = store(data)
    assert (sides, error) == ([20, 30, 20, 30], None)
    assert Image.open(io.BytesIO(stored)).size == (20, 30)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_on_white(mode):
    image = Image.new("RGBA", (20, 20), (*RED, 0)).convert(mode)
    options = {"transparency": image.getpixel((0, 0))} if mode == "P" else {}
    stored = store(encoded(image, "PNG", **options))[0]
    assert np.asarray(Image.open(io.BytesIO(stored)).convert("L")).min() > 250


def test_a_deep_png_is_stored_with_eight_bits():
    ramp = np.tile(np.arange(20, dtype=np.uint16) * 257, (20, 1))
    stored = store(encoded(Image.fromarray(ramp), "PNG"), encode_format="png", encode_quality=6)[0]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(stored))), ramp >> 8)


@pytest.mark.parametrize(
    ("data", "settings", "outcome"),
    [
        (encoded(Image.new("RGB", (60, 40)), "PNG"), {"max_pixels": 99}, Outcome.TOO_MANY_PIXELS),
        (encoded(Image.new("RGB", (60, 40)), "PNG"), {"min_image_px": 41}, Outcome.TOO_SMALL),
        (encoded(Image.new("RGB", (60, 2)), "PNG"), {}, Outcome.ASPECT_RATIO),
        (encoded(Image.new("RGB", (60, 40)), "EPS"), {}, Outcome.UNDECODABLE),
        (b"BM" + b"\0" * 4 + b"JFIF" + b"\0" * 90, {}, Outcome.UNDECODABLE),
    ],
)
def test_what_is_not_stored_has_its_reason(data, settings, outcome):
    *nothing, message = store(data, **settings)
    assert nothing == [None] * 5
    assert outcome_of("failed_to_resize", message) is outcome
