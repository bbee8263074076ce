"""Both hashes of images in one go, with images that cannot be decoded in their places."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from tasks.index import perceptual_hash
from tasks.index.perceptual_hash import grey_of, hash_images, hashes_of


def encoded(seed: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def test_every_image_has_its_hashes_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual_hash, "_AT_ONCE", 3)
    images = [encoded(0), b"no image", encoded(1, "WEBP"), encoded(2)[:-40], encoded(0), b""]
    found = hash_images(iter(images))
    assert len(found) == 6
    assert list(found.sha256) == [hashlib.sha256(image).hexdigest() for image in images]
    assert found.decoded.tolist() == [True, False, True, False, True, False]
    for place in (0, 2, 4):
        image = Image.open(io.BytesIO(images[place])).convert("RGB")
        assert found.looks[place] == hashes_of(grey_of(image)[None])[0]


def test_no_images_are_no_hashes() -> None:
    found = hash_images([])
    assert (found.sha256, found.looks.shape, found.decoded.shape) == ((), (0,), (0,))
