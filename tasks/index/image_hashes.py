"""Both hashes of encoded images: of their bytes, and of how they look.

Covers: hashing many images on several threads, images that cannot be decoded among them.
Not here: the perceptual hash and which hashes are near (perceptual_hash.py), reading images,
what is done with images that are alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from evaclip_model.reading.image_decoder import UnreadableImageError, decode_image
from tasks.index.perceptual_hash import GREY_PX, Hashes, grey_of, hashes_of

_AT_ONCE = 1000
"""Images held in memory."""


@dataclass(frozen=True)
class ImageHashes:
    """Hashes of n images, in their order."""

    sha256: tuple[str, ...]
    """Of the bytes, in hex."""
    looks: Hashes
    """Perceptual hashes [n]; without meaning where an image cannot be decoded."""
    decoded: npt.NDArray[np.bool_]
    """Whether each can be decoded [n]."""

    def __len__(self) -> int:
        return len(self.sha256)


def hash_images(images: Iterable[bytes], threads: int) -> ImageHashes:
    """Hash encoded images of any format that is decoded."""
    digests: list[str] = []
    looks, decoded = [np.empty(0, np.uint64)], [np.empty(0, np.bool_)]
    coming = iter(images)
    with ThreadPoolExecutor(threads) as pool:
        while batch := list(islice(coming, _AT_ONCE)):
            digests += [hashlib.sha256(image).hexdigest() for image in batch]
            greys = list(pool.map(_decode_grey, batch))
            nothing = np.zeros((GREY_PX, GREY_PX), np.uint8)
            looks.append(hashes_of(np.stack([nothing if g is None else g for g in greys])))
            decoded.append(np.array([grey is not None for grey in greys]))
    return ImageHashes(tuple(digests), np.concatenate(looks), np.concatenate(decoded))


def _decode_grey(encoded: bytes) -> npt.NDArray[np.uint8] | None:
    """The image small and grey, as a sample's is; None when it cannot be decoded."""
    try:
        return grey_of(decode_image(encoded).convert("RGB"))
    except UnreadableImageError:
        return None
