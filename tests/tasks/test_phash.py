"""The perceptual hash: what it keeps of an image, and finding near ones against comparing all."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from tasks.index.perceptual_hash import (
    KnownHashes,
    grey_of,
    hamming_distance,
    hashes_of,
    near_pairs,
)

RNG = np.random.default_rng(0)


def picture(seed: int, side: int = 96) -> Image.Image:
    """Smooth random colours, as photographs have."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def hash_of(image: Image.Image) -> np.ndarray:
    return hashes_of(grey_of(image)[None])


def scattered(count: int, near: int, bits: int) -> np.ndarray:
    """Distinct random hashes, `near` of them `bits` bits from another."""
    hashes = RNG.integers(0, 2**63, count, dtype=np.uint64)
    beside = hashes[:near].copy()
    for number in range(near):
        for bit in RNG.choice(64, bits, replace=False):
            beside[number] ^= np.uint64(1) << np.uint64(bit)
    return np.unique(np.concatenate([hashes, beside]))


def test_the_hash_is_the_sign_of_the_low_frequencies_about_their_median() -> None:
    grey = np.random.default_rng(1).integers(0, 256, (32, 32)).astype(np.uint8)
    place = np.arange(32)
    wave = [np.cos(np.pi * k * (2 * place + 1) / 64) for k in range(8)]
    low = np.array([[(grey * np.outer(a, b)).sum() for b in wave] for a in wave])
    bits = "".join("1" if value > np.median(low) else "0" for value in low.ravel())
    assert int(hashes_of(grey[None])[0]) == int(bits, 2)


def test_a_resized_or_brightened_picture_keeps_its_hash_and_another_does_not() -> None:
    original = hash_of(picture(1))
    for same in (picture(1).resize((61, 61)), ImageEnhance.Brightness(picture(1)).enhance(0.9)):
        assert hamming_distance(original, hash_of(same))[0] <= 4
    assert hamming_distance(original, hash_of(picture(2)))[0] > 12


def test_all_blank_pictures_have_one_hash() -> None:
    blanks = [Image.new("RGB", (40, 30), colour) for colour in ("white", "grey", (3, 200, 90))]
    assert len({int(hash_of(blank)[0]) for blank in blanks}) == 1


@pytest.mark.parametrize("bits", [0, 1, 4, 5])
@pytest.mark.parametrize("count", [0, 1, 300, 3000])
def test_near_pairs_are_those_that_comparing_all_with_all_finds(count: int, bits: int) -> None:
    hashes = scattered(count, min(count, 40), bits)
    pairs = [
        (left, right)
        for left in range(len(hashes))
        for right in left
        + 1
        + np.flatnonzero(hamming_distance(hashes[left + 1 :], hashes[left]) <= 4)
    ]
    assert [tuple(pair) for pair in near_pairs(hashes, 4).tolist()] == pairs
    if bits == 4 and count:
        assert pairs


def test_a_crowded_bucket_is_compared_as_well() -> None:
    base = np.uint64(0x0123456789ABCDEF)
    hashes = np.unique([base ^ (np.uint64(1) << np.uint64(bit)) for bit in range(64)] + [base])
    assert len(near_pairs(hashes, 4)) == 65 * 64 // 2


@pytest.mark.parametrize("bits", [0, 3, 4, 5])
def test_what_is_near_a_known_hash_is_found(bits: int) -> None:
    known = RNG.integers(0, 2**63, 5000, dtype=np.uint64)
    asked = known[:200].copy()
    for number in range(len(asked)):
        for bit in RNG.choice(64, bits, replace=False):
            asked[number] ^= np.uint64(1) << np.uint64(bit)
    expected = [bool((hamming_distance(known, one) <= 4).any()) for one in asked]
    assert KnownHashes(known, 4).find_near(asked).tolist() == expected
    assert expected == [bits <= 4] * 200
