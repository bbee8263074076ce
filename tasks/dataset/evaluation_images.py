"""The images that a model is tested on, as hashes, so that none of them is trained on.

Covers: folders of image files, and webdatasets of any layout.
Not here: comparing them with samples (choose.py).
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from evaclip_model.errors import InputError
from tasks.phash import Hashes, grey_of, hashes_of

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2")
_AT_ONCE = 1000
"""Images held in memory."""


@dataclass(frozen=True)
class EvaluationImages:
    """All images of some evaluation sets."""

    sha256: frozenset[str]
    looks: Hashes
    """Perceptual hashes of those that can be decoded."""


def read_evaluation_images(folders: Sequence[Path], threads: int) -> EvaluationImages:
    """Hash every image file, and every image in a tar, below the folders (or in single tars).

    Raises:
        InputError: a folder without an image, or a tar that cannot be read.
    """
    digests: set[str] = set()
    looks: list[Hashes] = []
    with ThreadPoolExecutor(threads) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about odd metadata
        for folder in folders:
            found = 0
            images = _images(folder)
            while batch := [image for _, image in zip(range(_AT_ONCE), images, strict=False)]:
                found += len(batch)
                digests.update(hashlib.sha256(image).hexdigest() for image in batch)
                greys = [grey for grey in pool.map(_grey, batch) if grey is not None]
                if greys:
                    looks.append(hashes_of(np.stack(greys)))
            if not found:
                raise InputError(
                    f"{folder} holds no image: give a folder of image files or of webdataset tars"
                )
    return EvaluationImages(
        frozenset(digests), np.unique(np.concatenate(looks)) if looks else np.empty(0, np.uint64)
    )


def _images(folder: Path) -> Iterator[bytes]:
    """Content of every image below `folder`, files and members of tars, by name."""
    files = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file())
    for file in files:
        if file.suffix.lower() in IMAGE_SUFFIXES:
            yield file.read_bytes()
        elif file.suffix == ".tar":
            try:
                yield from _members(file)
            except tarfile.TarError as error:
                raise InputError(
                    f"{file} cannot be read as a tar ({error}): make the evaluation set again"
                ) from error


def _members(file: Path) -> Iterator[bytes]:
    with tarfile.open(file, "r:") as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None and Path(member.name).suffix.lower() in IMAGE_SUFFIXES:
                yield content.read()


def _grey(encoded: bytes) -> npt.NDArray[np.uint8] | None:
    """The image small and grey, as a sample's is; None when it cannot be decoded."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            grey = grey_of(image.convert("RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError):
        return None
    return grey
