"""Image features of a set, in blocks that any process can make and none makes twice.

The model always sees chunks of one size, the last padded with zeros, on one thread of a CPU: a
feature is a function of its image alone, bit for bit. Libraries choose another order of summation
for another size, and share rows out to threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from evaclip_model.errors import InputError
from evaclip_model.reading.image_decoder import UnreadableImageError, decode_image
from evaclip_model.zeroshot.exact_ranks import normalise_features
from evaclip_model.zeroshot.set_layout import Span
from tasks.evaluate.encode.feature_cache import SUFFIX, read_block, write_block
from tasks.evaluate.encode.open_models import Subject

CHUNK = 64
"""Images that a model sees at once."""
BLOCK = 4 * CHUNK
"""Images of one file; a kill costs at most one block."""
_FEATURES = "features"


@dataclass(frozen=True)
class ImageList:
    """The images of one set, as the processes that encode them receive them."""

    name: str
    keys: tuple[str, ...]
    spans: tuple[Span, ...]
    crop_px: int = 0
    """Cut off every side of every image first."""

    def __len__(self) -> int:
        return len(self.keys)


class UnusableSetError(InputError):
    """An image of a set cannot be decoded: the set fails, the others do not."""


def begin_block(
    subject: Subject, images: ImageList, number: int, pool: Executor | None
) -> Iterator[Tensor]:
    """The model's input [3, S, S] for each image of a block; with a pool, all are decoded ahead.

    Raises:
        UnusableSetError: an image cannot be decoded; raised when its turn comes.
    """
    start = number * BLOCK
    rows = range(start, min(start + BLOCK, len(images)))
    decode = partial(_load_pixels, images, subject.transform)
    return map(decode, rows) if pool is None else pool.map(decode, rows)


def encode_block(
    subject: Subject, images: ImageList, number: int, decoded: Iterator[Tensor], folder: Path
) -> int:
    """Encode the images that `begin_block` decodes and write the block; returns their number.

    Raises:
        UnusableSetError: an image cannot be decoded.
        InputError: features are not finite.
    """
    parts = []
    while pixels := list(islice(decoded, CHUNK)):
        count = len(pixels)
        padded = torch.zeros(CHUNK, *pixels[0].shape)
        padded[:count] = torch.stack(pixels)
        with torch.inference_mode():
            encoded = subject.encode_image(padded)[:count]
            parts.append(normalise_features(encoded.cpu(), "image"))
    features = torch.cat(parts)
    write_block(_block_path(folder, number, len(images)), {_FEATURES: features})
    return len(features)


def missing_blocks(folder: Path, images: int) -> list[int]:
    """Numbers of the blocks of a set that are absent or damaged."""
    return [one for one in _blocks_of(images) if _read_block(folder, one, images) is None]


def read_features(folder: Path, images: int) -> Tensor | None:
    """Unit features of all images [N, D] in the order of the set; None if a block is missing."""
    parts = [_read_block(folder, one, images) for one in _blocks_of(images)]
    whole = [part for part in parts if part is not None]
    return torch.cat(whole) if len(whole) == len(parts) else None


def _blocks_of(images: int) -> range:
    return range((images + BLOCK - 1) // BLOCK)


def _block_path(folder: Path, number: int, images: int) -> Path:
    """File of a block; its name has the range of its samples."""
    start = number * BLOCK
    return folder / f"{start:09d}-{min(BLOCK, images - start)}{SUFFIX}"


def _read_block(folder: Path, number: int, images: int) -> Tensor | None:
    features = (read_block(_block_path(folder, number, images)) or {}).get(_FEATURES)
    expected = min(BLOCK, images - number * BLOCK)
    return features if features is not None and len(features) == expected else None


def _load_pixels(images: ImageList, transform: Callable[[Image.Image], Tensor], row: int) -> Tensor:
    try:
        image = decode_image(images.spans[row].read())
        if images.crop_px:
            edge = images.crop_px
            image = image.crop((edge, edge, image.width - edge, image.height - edge))
        return transform(image)
    except (UnreadableImageError, InputError) as error:  # undecodable, or its tar was cut short
        raise UnusableSetError(
            f"{images.spans[row].tar}: image {images.keys[row]}: {error}; every image of a set is "
            "evaluated or none, so fetch or write this set again"
        ) from None
