"""Images to tensors, as EVA-CLIP was trained and is evaluated: the evaluation transform, the
training crop, normalisation, and the two ways a recipe can have training images decoded.

The geometric step comes before the conversion to RGB, as in the reference: it matters for images
with a palette or transparency.

Decoded "reference" is Pillow throughout, as the authors' transform. "fast" does the same for JPEGs
with libjpeg-turbo called directly and the bicubic filter of torch, which is vectorised: the decoded
pixels are the same, the resized ones differ by at most `TOLERANCE` of 255. All else (PNG, WebP,
CMYK, turned photographs, whatever libjpeg warns of) goes the reference's way, to the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from evaclip_model.errors import InputError
from evaclip_model.model.model_config import ModelConfig
from evaclip_model.reading import image_decoder

if TYPE_CHECKING:
    from evaclip_model.model.clip import EvaClip

MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Of the red, green and blue channels on [0, 1] (CLIP)."""
STD = (0.26862954, 0.26130258, 0.27577711)
CROP_SCALE = (0.9, 1.0)
"""Smallest and largest share of an image's area that a training crop takes."""

TOLERANCE = 2
"""Largest difference of a "fast" pixel from the reference's, in levels of 255."""
Picture = Image.Image | NDArray[np.uint8]
"""A decoded image: Pillow's in its own mode, or RGB pixels [H, W, 3]."""
_CROP_RATIO = (3 / 4, 4 / 3)
_CROP_ATTEMPTS = 10
_PREMULTIPLIED = {"LA": "La", "RGBA": "RGBa"}
"""Mode with transparency -> the mode that Pillow resizes it in."""


def image_transform(
    model: EvaClip | ModelConfig | int, train: bool = False
) -> Callable[[Image.Image], Tensor]:
    """Return a function from an image of any mode and size to [3, S, S] float32; picklable.

    For evaluation the shortest side is resized to S (bicubic, antialiased) and the middle taken;
    for training a random part (`CROP_SCALE` of the area, ratio 3:4 to 4:3), drawn from torch's
    global generator in torchvision's order, is resized to S x S.

    Args:
        model: a model or its config, for its size; or the size S in pixels, from 1 (InputError).
        train: the training transform instead of the evaluation transform.
    """
    if not isinstance(model, int):
        config = model if isinstance(model, ModelConfig) else model.config
        model = config.vision.image_px
    if model < 1:
        raise InputError(f"image size {model} is not a number of pixels: give 1 or more")
    return ImageTransform(model, train)


@dataclass(frozen=True)
class ImageTransform:
    """A transform of `image_transform`."""

    size: int
    train: bool

    def __call__(self, image: Image.Image) -> Tensor:
        if not self.train:
            return normalize_images(centre_crop(image, self.size))
        box = crop_box(*image.size, _GlobalDraw(), CROP_SCALE)
        return normalize_images(resized_crop(image, box, self.size))


def describe_preprocessing(size: int) -> dict[str, Any]:
    """The evaluation transform for images of side `size` in words, to be compared with another's:
    with other constants a model loses accuracy, and nothing says so."""
    return {
        "size": size,
        "resize": "shortest side, bicubic, antialiased, columns before rows",
        "crop": "centre",
        "mean": list(MEAN),
        "std": list(STD),
    }


def centre_crop(image: Image.Image, size: int) -> Tensor:
    """Shortest side to `size` (bicubic, antialiased), then the middle: [3, S, S] uint8; raises
    UnreadableImageError for so narrow an image that its resized form passes `MAX_PIXELS`."""
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    if width * height > image_decoder.MAX_PIXELS:
        raise image_decoder.UnreadableImageError(
            f"{image.width} x {image.height} pixels would be resized to {width} x {height}, "
            f"more than {image_decoder.MAX_PIXELS:,}"
        )
    image = _resize_image(image, width, height)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return _to_uint8(image.crop((left, top, left + size, top + size)))


def train_crop(
    picture: Picture,
    size: int,
    *,
    seed: int,
    position: int,
    scale: tuple[float, float] = CROP_SCALE,
) -> Tensor:
    """A random part of the image, resized: the only augmentation EVA-CLIP trains with.

    Args:
        size: side S of the result, in pixels.
        position: of the sample in the training stream: with `seed`, all that the crop depends on.
        scale: smallest and largest share of the image's area.

    Returns: [3, S, S] uint8, in any layout.
    """
    width, height = picture.size if isinstance(picture, Image.Image) else picture.shape[1::-1]
    key = cast(np.random.SeedSequence, _Key((seed % 2**64, position)))  # numpy's types are narrower
    draw = SeededDraw(np.random.Generator(np.random.Philox(key)))
    left, top, right, bottom = box = crop_box(width, height, draw, scale)
    if isinstance(picture, Image.Image):
        return resized_crop(picture, box, size)
    # As [1, 3, H, W] with the channels last in memory: torch's fastest way, in and out.
    part = torch.from_numpy(picture[top:bottom, left:right])[None].permute(0, 3, 1, 2)
    return interpolate(part, (size, size), mode="bicubic", antialias=True)[0]


class _Key(np.random.bit_generator.ISeedSequence):
    """A generator's key as it is: given as `key`, numpy asks the system for randomness besides."""

    def __init__(self, key: tuple[int, int]) -> None:
        self._key = key

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> Any:
        return np.array(self._key, dtype)


@dataclass(frozen=True)
class SeededDraw:
    """Numbers of a generator of numpy's."""

    generator: np.random.Generator

    def draw_share(self, low: float, high: float) -> float:
        """Uniform on [low, high)."""
        # Generator.uniform computes just this, in four times the time
        return low + (high - low) * self.generator.random()

    def draw_ratio(self, low: float, high: float) -> float:
        """From low to high, its logarithm uniform."""
        return math.exp(self.draw_share(math.log(low), math.log(high)))

    def draw_offset(self, most: int) -> int:
        """Uniform among 0 ... most."""
        return int(self.generator.integers(0, most + 1))


class _GlobalDraw:
    """Numbers of torch's global generator, rounded as torchvision's RandomResizedCrop rounds."""

    def draw_share(self, low: float, high: float) -> float:
        return torch.empty(1).uniform_(low, high).item()

    def draw_ratio(self, low: float, high: float) -> float:
        start, end = torch.tensor((low, high)).log().tolist()
        return torch.empty(1).uniform_(start, end).exp().item()

    def draw_offset(self, most: int) -> int:
        return int(torch.randint(0, most + 1, (1,)).item())


def crop_box(
    width: int, height: int, draw: SeededDraw | _GlobalDraw, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random part, in pixels (Inception crop); when ten draws do
    not fit, of the largest middle part of an allowed ratio."""
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * draw.draw_share(*scale)
        ratio = draw.draw_ratio(*_CROP_RATIO)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = draw.draw_offset(height - h), draw.draw_offset(width - w)
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < _CROP_RATIO[0]:
        h = round(width / _CROP_RATIO[0])
    elif width / height > _CROP_RATIO[1]:
        w = round(height * _CROP_RATIO[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def resized_crop(image: Image.Image, box: tuple[int, int, int, int], size: int) -> Tensor:
    """Cut `box` (left, top, right, bottom) and resize it (bicubic): [3, S, S] uint8."""
    return _to_uint8(_resize_image(image.crop(box), size, size))


def _resize_image(image: Image.Image, width: int, height: int) -> Image.Image:
    """Bicubic, antialiased: columns first, then rows, rounded between them. Pillow 13 takes tall
    images the other way round: up to 30 levels of 255 away, at sharp edges."""
    if image.mode in _PREMULTIPLIED:
        weighted = _resize_image(image.convert(_PREMULTIPLIED[image.mode]), width, height)
        return weighted.convert(image.mode)
    bicubic = Image.Resampling.BICUBIC
    return image.resize((width, image.height), bicubic).resize((width, height), bicubic)


def normalize_images(images: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] -> float32 of the same shape, channels normalised by `MEAN`, `STD`."""
    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(3, 1, 1)
    return images.float().div_(255).sub_(mean).div_(std)


def _to_uint8(image: Image.Image) -> Tensor:
    pixels = np.array(image.convert("RGB"), dtype=np.uint8)  # [H, W, 3]
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def decode_fast(data: bytes | memoryview) -> Picture:
    """Decode a JPEG directly, anything else by Pillow; raises as `decode_image`."""
    encoded = bytes(data)
    if image_decoder.identify_format(encoded) == "JPEG":
        import simplejpeg  # not where a model is served, which reads by Pillow

        # libjpeg's warnings are errors; of them and images beyond the limits the reference judges
        with suppress(ValueError):
            height, width, space, _ = simplejpeg.decode_jpeg_header(encoded)
            image_decoder.require_decodable_jpeg(encoded, width, height, image_decoder.MAX_PIXELS)
            if (
                space in ("YCbCr", "Gray", "RGB")
                and image_decoder.read_jpeg_orientation(encoded) == 1
            ):
                pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(encoded, "RGB")
                return pixels
    return image_decoder.decode_image(encoded)
