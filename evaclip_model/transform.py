"""Images to tensors, as EVA-CLIP was trained and is evaluated.

Covers: decoding, the evaluation transform, the training crop, normalisation.
Not here: reading shards; masking patches.

The geometric step comes before the conversion to RGB, as in the reference: it matters for images
with a palette or transparency.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evaclip_model.clip import EvaClip
from evaclip_model.model_config import ModelConfig

MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of the red, green and blue channels on [0, 1] (CLIP)."""
STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of the channels on [0, 1] (CLIP)."""

MAX_PIXELS = 64_000_000
"""More than this is refused before decoding: a small file can claim a huge picture."""

_CROP_RATIO = (3 / 4, 4 / 3)
_CROP_ATTEMPTS = 10


class UnreadableImageError(ValueError):
    """These bytes are no image that can be used; one bad sample, not a failure of the run."""


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a JPEG, PNG or WebP file, in its own mode.

    Raises:
        UnreadableImageError: truncated, of no known format, or larger than `max_pixels`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > max_pixels:
                raise UnreadableImageError(
                    f"{image.width} x {image.height} pixels, more than {max_pixels:,}"
                )
            image.load()
    except UnreadableImageError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever their parsers meet
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error
    return image


def image_transform(model: EvaClip | ModelConfig | int) -> Callable[[Image.Image], Tensor]:
    """The evaluation transform: image -> [3, S, S] float32 normalised.

    Args:
        model: a model or its config, for its size; or the size S in pixels.
    """
    if isinstance(model, EvaClip):
        model = model.config
    size = model if isinstance(model, int) else model.vision.image_px
    return lambda image: normalize_images(centre_crop(image, size))


def centre_crop(image: Image.Image, size: int) -> Tensor:
    """Shortest side to `size` (bicubic, antialiased), then the middle: [3, S, S] uint8."""
    width, height = image.size
    short = min(width, height)
    image = image.resize(
        (int(size * width / short), int(size * height / short)), Image.Resampling.BICUBIC
    )
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return _to_uint8(image.crop((left, top, left + size, top + size)))


def train_crop(
    image: Image.Image,
    size: int,
    *,
    seed: int,
    position: int,
    scale: tuple[float, float] = (0.9, 1.0),
) -> Tensor:
    """A random part of the image, resized: the only augmentation EVA-CLIP trains with.

    Args:
        image: decoded, in any mode.
        size: side S of the result, in pixels.
        seed: of the training stage.
        position: of the sample in the whole training stream; the crop depends on nothing else.
        scale: smallest and largest share of the image's area; its aspect ratio is 3:4 to 4:3.

    Returns:
        [3, S, S] uint8.
    """
    draw = np.random.Generator(np.random.Philox(key=[seed % 2**64, position]))
    return resized_crop(image, crop_box(*image.size, draw, scale), size)


def crop_box(
    width: int, height: int, draw: np.random.Generator, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random part, in pixels (Inception crop).

    When ten draws do not fit, the largest middle part of an allowed ratio.
    """
    low, high = (math.log(ratio) for ratio in _CROP_RATIO)
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * draw.uniform(*scale)
        ratio = math.exp(draw.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(draw.integers(0, height - h + 1))
            left = int(draw.integers(0, width - w + 1))
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
    return _to_uint8(image.crop(box).resize((size, size), Image.Resampling.BICUBIC))


def normalize_images(images: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] -> float32 of the same shape, channels normalised by `MEAN`, `STD`."""
    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(3, 1, 1)
    return images.float().div_(255).sub_(mean).div_(std)


def _to_uint8(image: Image.Image) -> Tensor:
    pixels = np.array(image.convert("RGB"), dtype=np.uint8)  # [H, W, 3]
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
