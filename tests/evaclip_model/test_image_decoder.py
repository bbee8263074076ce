"""What strangers' images may cost, which of them are opened, and that all are opened alike."""

from __future__ import annotations

import io
import os
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from evaclip_model.reading import image_decoder
from evaclip_model.reading.image_decoder import (
    DamagedImageError,
    TooCostlyImageError,
    TooManyPixelsError,
    UnreadableImageError,
    decode_image,
    decode_undamaged_image,
)
from evaclip_model.reading.transform import decode_fast, train_crop
from tests.evaclip_model.hostile_images import gif_of_empty_blocks, jpeg_of_many_scans

DECODERS = pytest.mark.parametrize("decode", [decode_image, decode_undamaged_image, decode_fast])


def scene(width: int = 64, height: int = 48) -> Image.Image:
    """The upper half red, the lower half blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2] = (255, 0, 0)
    pixels[height // 2 :] = (0, 0, 255)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@DECODERS
def test_a_jpeg_of_many_scans_is_refused_by_its_header(decode):
    bomb = jpeg_of_many_scans(4000, 300)
    begin_s = time.process_time()
    with pytest.raises(TooCostlyImageError, match="302 scans of 4000 x 4000 pixels"):
        decode(bomb)
    assert time.process_time() - begin_s < 0.5


@DECODERS
def test_scans_hidden_in_front_of_a_false_end_of_image_are_counted(decode):
    bomb = jpeg_of_many_scans(4000, 300)
    first = bomb.index(b"\xff\xda")
    comment = b"\xff\xfe" + struct.pack(">H", 6) + b"\xff\xd9\xff\xd9"
    with pytest.raises(TooCostlyImageError, match="302 scans"):
        decode(bomb[:first] + comment + bomb[first:])


@DECODERS
def test_scans_behind_the_end_of_the_image_cost_nothing_and_are_not_counted(decode):
    decode(encoded(scene(), "JPEG") + b"\xff\xda" * 1000)


def test_a_progressive_photograph_is_decoded():
    assert decode_image(encoded(scene(600, 400), "JPEG", progressive=True)).size == (600, 400)


def test_blocks_without_content_end_at_the_clock(monkeypatch):
    monkeypatch.setattr(image_decoder, "MAX_DECODE_CPU_S", 0.2)
    begin_s = time.process_time()
    with pytest.raises(TooCostlyImageError, match=r"more than 0\.2 CPU seconds"):
        decode_image(gif_of_empty_blocks(5_000_000))
    assert time.process_time() - begin_s < 2


def test_a_tiff_of_millions_of_strips_is_refused_by_its_header():
    tiff = bytearray(encoded(scene(), "TIFF"))
    (directory,) = struct.unpack_from("<I", tiff, 4)
    (entries,) = struct.unpack_from("<H", tiff, directory)
    for at in range(directory + 2, directory + 2 + 12 * entries, 12):
        if struct.unpack_from("<H", tiff, at)[0] == 273:
            struct.pack_into("<I", tiff, at + 4, 5_000_000)
    with pytest.raises(TooCostlyImageError, match="5,000,000 strips"):
        decode_image(bytes(tiff))


def test_a_jpeg_inside_a_tiff_is_not_opened():
    with pytest.raises(UnreadableImageError, match="TIFF compression 7"):
        decode_image(encoded(scene(), "TIFF", compression="jpeg"))


@pytest.mark.parametrize("form", ["PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_every_format_has_its_pixels_counted_before_it_is_decoded(form):
    with pytest.raises(TooManyPixelsError, match="64 x 48 pixels, more than 1,000"):
        decode_image(encoded(scene(), form), max_pixels=1000)


def test_a_png_that_claims_billions_of_pixels_has_too_many():
    png = bytearray(encoded(scene(), "PNG"))
    struct.pack_into(">II", png, 16, 60_000, 60_000)
    struct.pack_into(">I", png, 29, zlib.crc32(png[12:29]))
    with pytest.raises(TooManyPixelsError):
        decode_image(bytes(png))


@DECODERS
def test_no_image_starts_a_program(decode, tmp_path, monkeypatch):
    script, started = tmp_path / "gs", tmp_path / "started"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo 10.0 || touch {started}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(UnreadableImageError, match="not an image of a known format"):
        decode(encoded(scene(), "EPS"))
    assert not started.exists()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("decode", [decode_image, decode_undamaged_image])
def test_a_photograph_that_the_camera_turned_is_upright(decode, form, orientation):
    back = {6: 8, 8: 6}.get(orientation, orientation)
    turn = image_decoder._TURNS.get(back)
    stored = scene() if turn is None else scene().transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode(encoded(stored, form, exif=exif))
    image = (decoded if decode is decode_image else decoded.image).convert("RGB")
    assert image.size == (64, 48)
    assert image.getpixel((30, 5))[0] > 200
    assert image.getpixel((30, 43))[2] > 200


def test_the_fast_decoder_sees_turned_photographs_upright_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(scene().transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif)
    crop = train_crop(decode_fast(data), 32, seed=0, position=0, scale=(1.0, 1.0)).float()
    assert crop[0, :12].mean() > 200
    assert crop[2, 20:].mean() > 200


@pytest.mark.parametrize("cut", [2, 7, 12, 19])
def test_an_orientation_that_is_cut_short_turns_nothing(cut):
    exif = Image.Exif()
    exif[0x0112] = 6
    block = exif.tobytes()[: 6 + cut]
    segment = b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block
    data = encoded(scene(), "JPEG")
    assert decode_image(data[:2] + segment + data[2:]).size == (64, 48)


def test_sixteen_bits_become_eight_and_thirty_two_are_refused():
    ramp = np.tile(np.arange(256, dtype=np.uint16) * 257, (8, 1))
    for form in ("PNG", "TIFF"):
        assert np.array_equal(decode_image(encoded(Image.fromarray(ramp), form)), ramp >> 8)
    with pytest.raises(UnreadableImageError, match="32 bits"):
        decode_image(encoded(Image.fromarray(ramp.astype(np.float32)), "TIFF"))


def test_a_jpeg_in_which_the_decoder_guesses_is_damaged():
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = bytearray(encoded(Image.fromarray(noise), "JPEG"))
    data[700:720] = bytes(20)
    decode_image(bytes(data))
    with pytest.raises(DamagedImageError, match="Corrupt JPEG data"):
        decode_undamaged_image(bytes(data))
    with pytest.raises(UnreadableImageError, match="truncated"):
        decode_undamaged_image(bytes(data[:700]))
