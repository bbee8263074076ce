"""Evaluation sets in the published webdataset layout, read through a tar member index.

Covers: the index (which bytes of which tar are which image, label or caption), its checks,
positioned reads, the fingerprint of a set's content.
Not here: decoding images, models, metrics. The layout:

    classnames.txt, zeroshot_classification_templates.txt    one a line (classification)
    dataset_type.txt                                         "retrieval" (retrieval)
    test/nshards.txt, test/0.tar ... test/N-1.tar            KEY.webp|png|jpg|jpeg + KEY.cls|.txt

Such sets have few shards, so they are never split by tar: samples are addressed one by one, in
shard order then tar order, and every one of them is evaluated exactly once.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from evaclip_model.errors import InputError
from tasks.artifact import sha256_of
from tasks.evaluate.registry import Kind, KnownSet

IMAGE_EXTENSIONS = frozenset({"webp", "png", "jpg", "jpeg"})
CLASSNAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
DATASET_TYPE = "dataset_type.txt"


@dataclass(frozen=True)
class Span:
    """Bytes of one tar member: where its content starts in its file, and how long it is."""

    tar: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """The member's content.

        Raises:
            InputError: the file is shorter than its index says.
        """
        descriptor = os.open(self.tar, os.O_RDONLY)
        try:
            content = os.pread(descriptor, self.size, self.offset)
        finally:
            os.close(descriptor)
        if len(content) != self.size:
            raise InputError(f"{self.tar} has changed while it was read: run the evaluation again")
        return content


@dataclass(frozen=True)
class EvalSample:
    """One image of a set, with what is known about it."""

    key: str
    image: Span
    label: int = -1
    """Line of the class in classnames.txt, from 0; -1 in a set of another kind."""
    labels: tuple[int, ...] = ()
    """All its classes in a multilabel set, rising; an image may have none."""
    captions: tuple[str, ...] = ()
    """The captions of a retrieval set's image."""


@dataclass(frozen=True)
class EvalSet:
    """A whole set: its index, its class names and its prompts."""

    name: str
    kind: Kind
    samples: tuple[EvalSample, ...]
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    fingerprint: str
    """16 hex digits over everything that its figures depend on, a model apart."""
    known: KnownSet | None = None
    """Its entry in the registry."""
    prompts_source: str = "dataset"
    """Where class names and templates come from: "dataset", or "NAMES names, PROMPTS prompts"."""
    crop_px: int = 0
    """Pixels that whoever decodes an image of this set must cut off every side first."""
    warnings: tuple[str, ...] = ()
    """What is unexpected about the set itself."""

    def __len__(self) -> int:
        return len(self.samples)


def open_set(
    name: str,
    folder: Path,
    kind: Kind,
    templates: Literal["dataset"] | Sequence[str] = "dataset",
) -> EvalSet:
    """Index the set in `folder`.

    Raises:
        InputError: a file is missing or unreadable, a sample lacks its image or its label, a
            label has no class name, or the set is of another kind.
    """
    _check_kind(name, folder, kind)
    samples = tuple(_samples(folder, kind))
    if not samples:
        raise InputError(f"evaluation set '{name}' has no sample in {folder / 'test'}")
    if kind == "retrieval":
        return EvalSet(name, kind, samples, (), (), fingerprint(folder))
    classnames = _lines(folder / CLASSNAMES, "one class name a line")
    for sample in samples:
        if not 0 <= sample.label < len(classnames):
            raise InputError(
                f"{sample.image.tar}: sample {sample.key} has label {sample.label}, but "
                f"{folder / CLASSNAMES} names {len(classnames)} classes, counted from 0"
            )
    prompts = (
        _lines(folder / TEMPLATES, "one prompt template with {c} a line")
        if templates == "dataset"
        else tuple(templates)
    )
    return EvalSet(name, kind, samples, classnames, prompts, fingerprint(folder))


def fingerprint(folder: Path) -> str:
    """16 hex digits over names and bytes of every file of the layout in `folder`.

    Raises:
        InputError: the folder holds no evaluation set.
    """
    names = [name for name in (CLASSNAMES, TEMPLATES, DATASET_TYPE) if (folder / name).is_file()]
    digest = hashlib.sha256()
    for path in (*(folder / name for name in names), *_tars(folder)):
        digest.update(f"{path.relative_to(folder)}\0{sha256_of(path)}\n".encode())
    return digest.hexdigest()[:16]


def _check_kind(name: str, folder: Path, kind: Kind) -> None:
    path = folder / DATASET_TYPE
    found = path.read_text().strip() if path.is_file() else "classification"
    if found != kind:
        raise InputError(
            f"evaluation set '{name}' is declared as {kind}, but {folder} is a {found} set: "
            "correct its kind in the recipe"
        )


def _tars(folder: Path) -> list[Path]:
    count_file = folder / "test" / "nshards.txt"
    try:
        count = int(count_file.read_text())
    except FileNotFoundError:
        raise InputError(
            f"{folder} is no evaluation set: {count_file} is missing (expected the published "
            "webdataset layout, test/nshards.txt beside test/0.tar)"
        ) from None
    except ValueError:
        raise InputError(f"{count_file} must hold one number, the number of tars") from None
    tars = [folder / "test" / f"{index}.tar" for index in range(count)]
    for tar in tars:
        if not tar.is_file():
            raise InputError(f"{tar} is missing: {count_file} says there are {count} tars")
    return tars


def _lines(path: Path, expected: str) -> tuple[str, ...]:
    try:
        lines = tuple(line.strip() for line in path.read_text().splitlines())
    except FileNotFoundError:
        raise InputError(f"{path} is missing: expected {expected}") from None
    # A trailing blank line is a text file's end; one inside would shift every label after it.
    while lines and not lines[-1]:
        lines = lines[:-1]
    if not lines or not all(lines):
        raise InputError(f"{path} is empty or has an empty line: expected {expected}")
    return lines


def _samples(folder: Path, kind: Kind) -> Iterator[EvalSample]:
    seen: set[str] = set()
    for tar in _tars(folder):
        for key, members in _members(tar).items():
            if key in seen:
                raise InputError(f"{tar}: sample {key} occurs twice in this set")
            seen.add(key)
            yield _sample(tar, key, members, kind)


def _members(tar: Path) -> dict[str, dict[str, Span]]:
    """Key -> extension -> bytes, in tar order."""
    found: dict[str, dict[str, Span]] = {}
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                span = Span(tar, member.offset_data, member.size)
                if member.offset_data + member.size > tar.stat().st_size:
                    raise tarfile.ReadError("unexpected end of data")
                if found.setdefault(key, {}).setdefault(extension.lower(), span) is not span:
                    raise InputError(f"{tar}: member {member.name} occurs twice")
    except tarfile.TarError as error:
        raise InputError(
            f"{tar} cannot be read as a tar ({error}): fetch it again, it may be incomplete"
        ) from None
    return found


def _sample(tar: Path, key: str, members: dict[str, Span], kind: Kind) -> EvalSample:
    images = [span for extension, span in members.items() if extension in IMAGE_EXTENSIONS]
    if len(images) != 1:
        raise InputError(f"{tar}: sample {key} has {len(images)} images, expected one")
    wanted = "cls" if kind == "classification" else "txt"
    if wanted not in members:
        raise InputError(f"{tar}: sample {key} has no .{wanted} member")
    text = members[wanted].read().decode("utf-8", "replace")
    if kind == "retrieval":
        captions = tuple(line.replace("\\n", "\n").strip() for line in text.split("\n"))
        captions = tuple(caption for caption in captions if caption)
        if not captions:
            raise InputError(f"{tar}: sample {key} has no caption")
        return EvalSample(key, images[0], captions=captions)
    if not text.strip().isdecimal():
        raise InputError(f"{tar}: {key}.cls must hold a class number, got {text.strip()[:20]!r}")
    return EvalSample(key, images[0], label=int(text))
