"""From a sample's bytes to the square a model trains on.

Covers: the two ways a recipe can ask for: the reference's pixels, or nearly those in less than half
the time. Not here: what part of an image is taken (transform.py); reading shards (reader.py).

"reference" is Pillow throughout, as the authors' transform. "fast" does the same for JPEGs with
libjpeg-turbo called directly and the bicubic filter of torch, which is vectorised: the decoded
pixels are the same, the resized ones differ by at most `TOLERANCE` of 255. All else (PNG, WebP,
CMYK, turned photographs, whatever libjpeg warns of) goes the reference's way, to the same bits.

Decoding at a smaller scale in the DCT domain would save a sixth on images of 800 pixels, nothing on
those of the usual 256 to 512, and cost the tolerance; OpenCV's resizing is not antialiased, or it
is slower.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from evaclip_model.reading.image_decoder import (
    MAX_PIXELS,
    decode_image,
    identify_format,
    read_jpeg_orientation,
    require_decodable_jpeg,
)
from evaclip_model.reading.transform import resized_crop, train_box

TOLERANCE = 2
"""Largest difference of a "fast" pixel from the reference's, in levels of 255."""
_RGB_SPACES = ("YCbCr", "Gray", "RGB")


class Picture(Protocol):
    """A decoded image."""

    @property
    def bytes(self) -> int:
        """Memory that it takes."""

    def train_crop(
        self, size: int, *, seed: int, position: int, scale: tuple[float, float]
    ) -> Tensor:
        """[3, size, size] uint8, in any layout: what `transform.train_box` names, resized."""


class Decoder(Protocol):
    """Encoded image -> picture."""

    def __call__(self, data: bytes | memoryview) -> Picture:
        """Decode an image.

        Raises:
            UnreadableImageError: truncated, of no known format, or too large.
        """


class _Reference:
    """An image of Pillow's, in its own mode."""

    def __init__(self, image: Image.Image) -> None:
        self._image = image

    @property
    def bytes(self) -> int:
        return self._image.width * self._image.height * len(self._image.getbands())

    def train_crop(
        self, size: int, *, seed: int, position: int, scale: tuple[float, float]
    ) -> Tensor:
        box = train_box(*self._image.size, seed=seed, position=position, scale=scale)
        return resized_crop(self._image, box, size)


class _Pixels:
    """RGB pixels, [H, W, 3] uint8."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        self._pixels = pixels

    @property
    def bytes(self) -> int:
        return self._pixels.nbytes

    def train_crop(
        self, size: int, *, seed: int, position: int, scale: tuple[float, float]
    ) -> Tensor:
        height, width, _ = self._pixels.shape
        left, top, right, bottom = train_box(
            width, height, seed=seed, position=position, scale=scale
        )
        # As [1, 3, H, W] with the channels last in memory: torch's fastest way, in and out.
        part = torch.from_numpy(self._pixels[top:bottom, left:right])[None].permute(0, 3, 1, 2)
        return interpolate(part, (size, size), mode="bicubic", antialias=True)[0]


def decode_reference(data: bytes | memoryview) -> Picture:
    """Decode by Pillow; see `Decoder`."""
    return _Reference(decode_image(data))


def decode_fast(data: bytes | memoryview) -> Picture:
    """Decode a JPEG directly, anything else by Pillow; see `Decoder`."""
    encoded = bytes(data)
    pixels = _jpeg_pixels(encoded) if identify_format(encoded) == "JPEG" else None
    return decode_reference(encoded) if pixels is None else _Pixels(pixels)


def _jpeg_pixels(data: bytes) -> NDArray[np.uint8] | None:
    """Pixels of a whole JPEG, [H, W, 3]; none for one that only the reference can judge."""
    # strict, as by default: libjpeg's warnings are errors
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        require_decodable_jpeg(data, width, height, MAX_PIXELS)
        if space not in _RGB_SPACES or read_jpeg_orientation(data) != 1:
            return None
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:  # an image beyond the limits, too: the reference says so again
        return None
    return pixels


DECODERS: Mapping[Literal["fast", "reference"], Decoder] = {
    "fast": decode_fast,
    "reference": decode_reference,
}
"""Name in a recipe -> decoder."""
