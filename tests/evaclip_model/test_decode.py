"""The fast decoder against the reference: JPEGs within the tolerance, all else exactly."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from evaclip_model.reading.image_decoder import UnreadableImageError, decode_image
from evaclip_model.reading.transform import TOLERANCE, decode_fast, train_crop

MEAN_DIFFERENCE = 0.05
"""Of all pixels, in levels of 255: most of them are the same."""


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth shapes, sharp edges and noise, as a photograph has them."""
    rng = np.random.default_rng(width * height)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 17 + c) + np.cos(y / (11 + c)) for c in range(3)], axis=-1)
    pixels = 128 + 50 * waves + rng.normal(0, 12, waves.shape)
    pixels[height // 3 : height // 2, width // 4 :] = (250, 5, 90)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if mode == "P":
        return image.quantize(16)
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image if mode in ("RGB", "RGBA") else image.convert(mode)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def crop(decoder, data: bytes, size: int, position: int = 3) -> torch.Tensor:
    return train_crop(decoder(data), size, seed=1, position=position, scale=(0.9, 1.0))


@pytest.mark.parametrize(
    "size", [(224, 224), (299, 224), (256, 341), (512, 384), (800, 600), (60, 90), (31, 700)]
)
@pytest.mark.parametrize(
    "options",
    [{"quality": 95}, {"quality": 60, "progressive": True}, {"quality": 90, "subsampling": 0}],
    ids=["baseline", "progressive", "444"],
)
def test_a_fast_jpeg_is_within_the_stated_tolerance_of_the_reference(size, options):
    data = encoded(picture(*size), "JPEG", **options)
    for position in range(4):
        fast = crop(decode_fast, data, 224, position)
        reference = crop(decode_image, data, 224, position)
        assert fast.dtype == torch.uint8
        assert fast.shape == reference.shape == (3, 224, 224)
        difference = (fast.int() - reference.int()).abs()
        assert difference.max() <= TOLERANCE
        assert difference.float().mean() <= MEAN_DIFFERENCE


def test_a_grey_jpeg_is_within_the_tolerance_too():
    data = encoded(picture(300, 200, "L"), "JPEG", quality=92)
    fast, reference = crop(decode_fast, data, 112), crop(decode_image, data, 112)
    assert (fast.int() - reference.int()).abs().max() <= TOLERANCE
    assert torch.equal(fast[0], fast[1])


@pytest.mark.parametrize(
    ("mode", "format"),
    [("CMYK", "JPEG"), ("RGB", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("RGB", "WEBP")],
)
def test_what_is_no_plain_jpeg_is_the_reference_to_the_bit(mode, format):
    data = encoded(picture(120, 90, mode), format)
    assert torch.equal(crop(decode_fast, data, 64), crop(decode_image, data, 64))


def test_the_reference_is_the_authors_transform():
    data = encoded(picture(120, 90), "JPEG")
    expected = train_crop(decode_image(data), 64, seed=1, position=3)
    assert torch.equal(crop(decode_image, data, 64), expected)


def test_bytes_behind_a_jpeg_do_no_harm():
    data = encoded(picture(120, 90), "JPEG")
    assert torch.equal(crop(decode_fast, data + b"more", 64), crop(decode_fast, data, 64))


JPEG = encoded(picture(120, 90), "JPEG")


@pytest.mark.parametrize("decoder", [decode_fast, decode_image])
@pytest.mark.parametrize(
    "data", [b"", b"<html>404</html>", JPEG[:30], JPEG[: len(JPEG) // 2], JPEG[:3] + b"x" * 99]
)
def test_what_cannot_be_decoded_is_one_bad_sample_whichever_way(decoder, data):
    with pytest.raises(UnreadableImageError):
        decoder(data)


def test_a_jpeg_that_claims_too_many_pixels_is_not_decoded():
    data = bytearray(encoded(Image.new("RGB", (16, 16)), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = (10_000).to_bytes(2, "big") * 2
    with pytest.raises(UnreadableImageError, match="10000 x 10000 pixels"):
        decode_fast(bytes(data))
