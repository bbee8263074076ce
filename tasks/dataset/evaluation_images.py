"""The images that a model is tested on, as hashes, so that none of them is trained on.

Covers: folders of image files, and webdatasets of any layout.
Not here: hashing an image (tasks/index/image_hashes.py), comparing with samples (choose.py).
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaclip_model.errors import InputError
from tasks.index.image_hashes import hash_images
from tasks.index.perceptual_hash import Hashes

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2")


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
    looks = [np.empty(0, np.uint64)]
    for folder in folders:
        hashes = hash_images(_iterate_images(folder), threads)
        if not len(hashes):
            raise InputError(
                f"{folder} holds no image: give a folder of image files or of webdataset tars"
            )
        digests.update(hashes.sha256)
        looks.append(hashes.looks[hashes.decoded])
    return EvaluationImages(frozenset(digests), np.unique(np.concatenate(looks)))


def _iterate_images(folder: Path) -> Iterator[bytes]:
    """Content of every image below `folder`, files and members of tars, by name."""
    files = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file())
    for file in files:
        if file.suffix.lower() in IMAGE_SUFFIXES:
            yield file.read_bytes()
        elif file.suffix == ".tar":
            try:
                yield from _iterate_members(file)
            except tarfile.TarError as error:
                raise InputError(
                    f"{file} cannot be read as a tar ({error}): make the evaluation set again"
                ) from error


def _iterate_members(file: Path) -> Iterator[bytes]:
    with tarfile.open(file, "r:") as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None and Path(member.name).suffix.lower() in IMAGE_SUFFIXES:
                yield content.read()
