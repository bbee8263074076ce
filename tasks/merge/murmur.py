"""LAION's row key: the first 64 bits of MurmurHash3 (x64, 128 bits) of URL and caption.

Covers: the hash for many strings at once.
Not here: joining by it; see units.py.

LAION published its safety and watermark scores beside the metadata, keyed by
`mmh3.hash64(url + caption)[0]`, with '' for what is missing. Algorithm: Austin Appleby's
MurmurHash3_x64_128 (public domain), seed 0; here strings of similar length are hashed together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
C1, C2 = np.uint64(0x87C37B91114253D5), np.uint64(0x4CF5AD432745937F)
BLOCK = 16
TOGETHER = 4096
"""Strings hashed at once: their padded bytes stay in the processor's cache."""


def laion_hash(texts: Sequence[str]) -> npt.NDArray[np.int64]:
    """[number of texts] LAION's hash of every text."""
    encoded = [text.encode() for text in texts]
    result = np.zeros(len(encoded), np.int64)
    by_length = sorted(range(len(encoded)), key=lambda place: len(encoded[place]))
    for start in range(0, len(by_length), TOGETHER):
        places = by_length[start : start + TOGETHER]
        result[places] = _hash([encoded[place] for place in places])
    return result


def _hash(texts: Sequence[bytes]) -> npt.NDArray[np.int64]:
    lengths = np.array([len(text) for text in texts], np.uint64)
    blocks = int(lengths.max()) // BLOCK + 1
    padded = b"".join(text.ljust(blocks * BLOCK, b"\0") for text in texts)
    words = np.frombuffer(padded, "<u8").reshape(len(texts), blocks, 2)
    whole = lengths // np.uint64(BLOCK)
    h1, h2 = np.zeros_like(lengths), np.zeros_like(lengths)
    for block in range(blocks):
        k1 = _rotated(words[:, block, 0] * C1, 31) * C2
        k2 = _rotated(words[:, block, 1] * C2, 33) * C1
        full_1 = (_rotated(h1 ^ k1, 27) + h2) * np.uint64(5) + np.uint64(0x52DCE729)
        full_2 = (_rotated(h2 ^ k2, 31) + full_1) * np.uint64(5) + np.uint64(0x38495AB5)
        is_full, is_tail = block < whole, block == whole
        # the padding of a tail is zero, which adds nothing: x ^ 0 = x
        h1, h2 = (
            np.where(is_full, full_1, np.where(is_tail, h1 ^ k1, h1)),
            np.where(is_full, full_2, np.where(is_tail, h2 ^ k2, h2)),
        )
    h1, h2 = h1 ^ lengths, h2 ^ lengths
    h1 = h1 + h2
    h2 = h2 + h1
    return (_mixed(h1) + _mixed(h2)).view(np.int64)


def _rotated(words: Words, bits: int) -> Words:
    return (words << np.uint64(bits)) | (words >> np.uint64(64 - bits))


def _mixed(words: Words) -> Words:
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        words = (words ^ (words >> np.uint64(33))) * np.uint64(factor)
    return words ^ (words >> np.uint64(33))
