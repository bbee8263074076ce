"""Hashes of images: of their bytes, and of how they look (64 bits each); and which of many look
nearly the same.

The perceptual hash is the usual pHash: of the 32 x 32 grey image, is each of the 64 lowest
frequencies of its cosine transform above their median? Row by row, the first is the highest bit, as
imagehash writes it. Two hashes that differ in at most d of 64 bits are equal in at least e of any
d + e bands, so images that look alike are found by sorting, once for every choice of e bands, and
never by comparing all with all (Manku, Jain, Das Sarma: Detecting near-duplicates for web crawling,
2007).
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import combinations, islice, pairwise

import numpy as np
import numpy.typing as npt
from PIL import Image

from evaclip_model.reading.image_decoder import UnreadableImageError, decode_image

Hashes = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]

BITS = 64
GREY_PX = 32
_LOW = 8
_NOISE_DECIMALS = 6
"""Frequencies that an image does not have come out as 1e-11, with a sign that means nothing."""
_MOST_IN_A_BUCKET = 16
_MOST_EQUAL_BANDS = 4

_COSINES = np.cos(
    np.pi * np.arange(_LOW)[:, None] * (2 * np.arange(GREY_PX)[None, :] + 1) / (2 * GREY_PX)
)
_AT_ONCE = 1000
"""Images held in memory."""


def grey_of(image: Image.Image) -> npt.NDArray[np.uint8]:
    """The image in grey that the hash is made from, [32, 32]."""
    small = image.convert("L").resize((GREY_PX, GREY_PX), Image.Resampling.LANCZOS)
    return np.asarray(small)


def hashes_of(greys: npt.NDArray[np.uint8]) -> Hashes:
    """Perceptual hashes of n grey images, [n, 32, 32] -> [n]."""
    low = np.round(_COSINES @ greys.astype(np.float64) @ _COSINES.T, _NOISE_DECIMALS)
    flat = low.reshape(-1, BITS)
    above = flat > np.median(flat, axis=1, keepdims=True)
    return np.packbits(above, axis=1).view(">u8").ravel().astype(np.uint64)


def hamming_distance(left: Hashes, right: Hashes) -> npt.NDArray[np.uint8]:
    """Bits in which two arrays of hashes differ, element by element."""
    differing: npt.NDArray[np.uint8] = np.bitwise_count(left ^ right)
    return differing


def near_pairs(hashes: Hashes, most: int) -> npt.NDArray[np.int64]:
    """All pairs of places (i < j, sorted) whose hashes differ in at most `most` bits, [m, 2].

    `hashes` must differ from each other: equal ones would all be paired with each other.
    """
    found = [_pairs_with_equal_bands(hashes, mask, most) for mask in _band_masks(most, len(hashes))]
    return np.unique(np.concatenate(found), axis=0)


def is_crowded(hashes: Hashes, most: int) -> bool:
    """Return whether some of `hashes` look so alike that `near_pairs` would compare most of them
    with each other."""
    for mask in _band_masks(most, len(hashes)):
        _, sizes = np.unique(hashes & mask, return_counts=True)
        if (sizes * (sizes - 1)).sum() > 2 * _MOST_IN_A_BUCKET * len(hashes):
            return True
    return False


class KnownHashes:
    """Hashes to find again, such as those of evaluation images; `most` bits may differ."""

    def __init__(self, hashes: Hashes, most: int) -> None:
        known = np.unique(hashes)
        self._most = most
        self._by_band: list[tuple[np.uint64, Hashes, Hashes]] = []
        for mask in _band_masks(most, len(known)):
            order = np.argsort(known & mask, kind="stable")
            self._by_band.append((mask, known[order] & mask, known[order]))

    def find_near(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """Mask of the `hashes` that are within the distance of a known one, [n]."""
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # NumPy searches unlocked
            found = list(pool.map(partial(self._find_by_band, hashes), self._by_band))
        result: npt.NDArray[np.bool_] = np.logical_or.reduce(found)
        return result

    def _find_by_band(
        self, hashes: Hashes, band: tuple[np.uint64, Hashes, Hashes]
    ) -> npt.NDArray[np.bool_]:
        """Mask of those that agree with a known one in the bits of a band, too, [n]."""
        mask, keys, known = band
        result = np.zeros(len(hashes), dtype=np.bool_)
        asked = hashes & mask
        first = np.searchsorted(keys, asked, side="left")
        last = np.searchsorted(keys, asked, side="right")
        places: Places = np.flatnonzero(first < last)
        at = first[places]
        while len(places):
            close = hamming_distance(hashes[places], known[at]) <= self._most
            result[places[close]] = True
            at += 1
            more = ~close & (at < last[places])
            places, at = places[more], at[more]
        return result


def _pairs_with_equal_bands(hashes: Hashes, mask: np.uint64, most: int) -> npt.NDArray[np.int64]:
    """Pairs (i < j) that agree in all bits of `mask` and differ in at most `most` others."""
    order: Places = np.argsort(hashes & mask, kind="stable")
    keys = (hashes & mask)[order]
    here: Places = np.flatnonzero(keys[1:] == keys[:-1])
    found, step = [np.empty((0, 2), dtype=np.int64)], 1
    while len(here):
        left, right = order[here], order[here + step]
        close = hamming_distance(hashes[left], hashes[right]) <= most
        pairs = np.stack([left, right], axis=1)[close]
        found.append(np.sort(pairs, axis=1))
        step += 1
        here = here[here + step < len(keys)]
        here = here[keys[here] == keys[here + step]]
    return np.concatenate(found)


def _band_masks(most: int, hashes: int) -> Iterator[np.uint64]:
    """Bits that are compared together, for every choice of the bands that may have to be equal.

    More bands in each choice mean smaller buckets and more sorting; taken are the fewest with which
    buckets stay small.
    """
    equal = 1
    while equal < _MOST_EQUAL_BANDS and (
        hashes >= _MOST_IN_A_BUCKET << BITS * equal // (most + equal)
    ):
        equal += 1
    edges = np.linspace(0, BITS, most + equal + 1).round().astype(int).tolist()
    bands = [(1 << stop) - (1 << start) for start, stop in pairwise(edges)]
    for chosen in combinations(bands, equal):
        yield np.uint64(sum(chosen))


@dataclass(frozen=True)
class ImageHashes:
    """Hashes of n images, in their order: of their bytes, in hex; perceptual ones [n], without
    meaning where not `decoded` [n]."""

    sha256: tuple[str, ...]
    looks: Hashes
    decoded: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.sha256)


def hash_images(images: Iterable[bytes]) -> ImageHashes:
    digests: list[str] = []
    looks, decoded = [np.empty(0, np.uint64)], [np.empty(0, np.bool_)]
    coming = iter(images)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
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
