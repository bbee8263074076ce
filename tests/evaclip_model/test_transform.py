"""Transforms against tensors made by the authors' own code (data/README.md)."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from evaclip_model.errors import InputError
from evaclip_model.model.model_config import ModelConfig
from evaclip_model.reading.image_decoder import UnreadableImageError, decode_image
from evaclip_model.reading.transform import (
    SeededDraw,
    crop_box,
    image_transform,
    normalize_images,
    resized_crop,
    train_crop,
)

DATA = Path(__file__).parent / "data" / "transforms"
BOXES = json.loads((DATA / "train_boxes.json").read_text())


@pytest.mark.parametrize("file", sorted(BOXES))
def test_the_evaluation_transform_equals_the_original(file: str):
    expected = load_file(DATA / "expected.safetensors")[f"{Path(file).stem}.eval32"]
    got = image_transform(32)(decode_image((DATA / file).read_bytes()))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("file", sorted(BOXES))
def test_a_training_crop_of_the_original_box_equals_the_original(file: str):
    expected = load_file(DATA / "expected.safetensors")[f"{Path(file).stem}.train56_seed4"]
    top, left, height, width = BOXES[file]
    box = (left, top, left + width, top + height)
    got = resized_crop(decode_image((DATA / file).read_bytes()), box, 56)
    torch.testing.assert_close(normalize_images(got), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("file", sorted(BOXES))
def test_the_training_transform_draws_as_the_original_does(file: str):
    expected = load_file(DATA / "expected.safetensors")[f"{Path(file).stem}.train56_seed4"]
    image = decode_image((DATA / file).read_bytes())
    torch.manual_seed(4)
    got = image_transform(56, train=True)(image)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("train", [False, True])
def test_a_transform_can_be_sent_to_another_process(train: bool):
    transform = image_transform(ModelConfig.load("EVA02-CLIP-B-16"), train)
    assert pickle.loads(pickle.dumps(transform)) == transform
    assert transform(Image.new("RGB", (300, 90))).shape == (3, 224, 224)


def test_a_size_below_one_is_a_mistake():
    with pytest.raises(InputError, match="image size 0 "):
        image_transform(0)


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_resized_in_its_own_colours_and_then_becomes_rgb(mode: str):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 4), dtype=np.uint8)
    picture = Image.fromarray(pixels, "RGBA").convert("P" if mode == "PA" else mode).convert(mode)
    small = picture.resize((36, 24), Image.Resampling.BICUBIC).crop((6, 0, 30, 24)).convert("RGB")
    expected = normalize_images(torch.from_numpy(np.array(small)).permute(2, 0, 1))
    assert torch.equal(image_transform(24)(picture), expected)
    assert image_transform(24, train=True)(picture).shape == (3, 24, 24)


def test_sixteen_bits_of_grey_are_not_clipped_to_white():
    deep = np.linspace(0, 65535, 48 * 48).reshape(48, 48).astype(np.uint16)
    file = io.BytesIO()
    Image.fromarray(deep).save(file, "PNG")
    got = image_transform(48)(decode_image(file.getvalue()))
    flat = normalize_images(torch.from_numpy((deep >> 8).astype(np.uint8)).expand(3, 48, 48))
    assert torch.equal(got, flat)


def test_a_training_crop_depends_on_seed_and_position_alone():
    image = decode_image((DATA / "palette_alpha.png").read_bytes())
    crops = [
        train_crop(image, 24, seed=seed, position=position)
        for seed, position in ((1, 5), (1, 5), (2, 5), (1, 6))
    ]
    assert crops[0].dtype == torch.uint8
    assert crops[0].shape == (3, 24, 24)
    assert torch.equal(crops[0], crops[1])
    assert not torch.equal(crops[0], crops[2])
    assert not torch.equal(crops[0], crops[3])


def test_random_boxes_lie_inside_and_have_the_area_and_ratio_asked_for():
    draw = SeededDraw(np.random.default_rng(0))
    for _ in range(300):
        left, top, right, bottom = crop_box(640, 480, draw, (0.5, 0.8))
        assert 0 <= left < right <= 640
        assert 0 <= top < bottom <= 480
        width, height = right - left, bottom - top
        assert 0.49 < width * height / (640 * 480) < 0.81
        assert 0.74 < width / height < 1.35


@pytest.mark.parametrize(
    ("size", "box"), [((1000, 10), (494, 0, 507, 10)), ((10, 1000), (0, 494, 10, 507))]
)
def test_an_extreme_image_gets_the_largest_middle_part(size, box):
    left, top, right, bottom = crop_box(*size, SeededDraw(np.random.default_rng(0)), (0.9, 1.0))
    assert max(abs(a - b) for a, b in zip((left, top, right, bottom), box, strict=True)) <= 1


def png(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", png((40, 40))[:60]])
def test_bytes_that_are_no_image_are_named_as_such(data: bytes):
    with pytest.raises(UnreadableImageError):
        decode_image(data)


def test_an_image_that_claims_too_many_pixels_is_not_decoded():
    with pytest.raises(UnreadableImageError, match="40 x 40 pixels, more than 1,000"):
        decode_image(png((40, 40)), max_pixels=1000)


def test_a_tall_image_is_resized_columns_first_whichever_pillow_is_installed():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 2, (324, 247, 3), dtype=np.uint8) * 255
    box = (0, 0, 247, 324)
    # One axis at a time: no version has an order to choose.
    columns = Image.fromarray(noise).resize((224, 324), Image.Resampling.BICUBIC)
    turned = columns.transpose(Image.Transpose.TRANSPOSE).resize(
        (224, 224), Image.Resampling.BICUBIC
    )
    expected = np.asarray(turned.transpose(Image.Transpose.TRANSPOSE))
    got = resized_crop(Image.fromarray(noise), box, 224)
    assert np.array_equal(got.permute(1, 2, 0).numpy(), expected)


def test_a_line_of_pixels_is_refused_before_it_is_blown_up():
    with pytest.raises(UnreadableImageError, match="1 x 60000 pixels would be resized"):
        image_transform(224)(Image.new("RGB", (1, 60_000)))
