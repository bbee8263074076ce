"""Evaluation sets in the published webdataset layout, read through a tar member index.

Covers: the index (which bytes of which tar are which image, label or caption), its checks, where it
is kept, positioned reads, the fingerprint of a set's content.
Not here: decoding images, models, metrics, where names and prompts come from (prompts.py). The
layout:

    classnames.txt, zeroshot_classification_templates.txt    one a line (sets with classes)
    dataset_type.txt                                         "retrieval" or "multilabel"
    test/nshards.txt, test/0.tar ... test/N-1.tar            KEY.webp|png|jpg|jpeg, and with it
                                                             KEY.cls, .npy or .txt, by its kind

Such sets have few shards, so they are never split by tar: samples are addressed one by one, in the
order of their keys, and every one of them is evaluated exactly once. The same samples are the same
set in however many tars.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evaclip_model.errors import InputError
from evaclip_model.files import write_atomically
from tasks.evaluate.sets.prompts import (
    CLASSNAMES,
    find_classnames,
    find_templates,
    subset_classes,
)
from tasks.evaluate.sets.set_registry import Kind, KnownSet, NameSource, PromptSource

IMAGE_EXTENSIONS = frozenset({"webp", "png", "jpg", "jpeg"})
DATASET_TYPE = "dataset_type.txt"
SPLIT = "test"
"""Folder of the tars; the published layout has others, for training, beside it."""
SHARDS = "nshards.txt"

_ANSWERS = {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}
"""Kind -> extension of the member that says what is right."""
_INDEX_VERSION = 1
_THOUSAND = 1000


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
    sha256: str = ""
    """Of the image file, in hex."""


@dataclass(frozen=True)
class EvalSet:
    """A whole set: its index, its class names and its prompts."""

    name: str
    kind: Kind
    samples: tuple[EvalSample, ...]
    """In the order of their keys."""
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    fingerprint: str
    """16 hex digits over images, answers, class names and the crop; the same for the same samples
    in other tars. Prompts have a digest of their own."""
    images_digest: str = ""
    """16 hex digits over the images and the crop alone: what image features depend on."""
    known: KnownSet | None = None
    """Its entry in the registry."""
    prompts_source: str = "dataset"
    """Where its templates come from, and its class names where these come from elsewhere."""
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
    templates: PromptSource | Sequence[str] = "dataset",
    *,
    known: KnownSet | None = None,
    classnames: NameSource | Sequence[str] = "dataset",
    index_cache: Path | None = None,
    crop_px: int = 0,
) -> EvalSet:
    """Index the set in `folder`.

    Args:
        templates: prompts of a set with classes: a source's name, or the list itself.
        known: its entry in the registry, for classes, sources, and what size to expect.
        classnames: likewise, in the order of the labels.
        index_cache: folder that keeps the index, so that the tars are read once; an index is used
            as long as their sizes and times of change are the same.
        crop_px: pixels to cut off every side of every image.

    Raises:
        InputError: a file is missing or unreadable, a sample lacks its image or its label, a
            label has no class name, a source lacks the set, or the set is of another kind.
    """
    found = kind_of(folder)
    if found != kind:
        raise InputError(
            f"evaluation set '{name}' is declared as {kind}, but {folder} is a {found} set: "
            "correct its kind in the recipe"
        )
    tars = find_tars(folder)
    entries = _index(tars, kind, index_cache)
    if not entries:
        raise InputError(f"evaluation set '{name}' has no sample in {folder / SPLIT}")
    names: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    source = "dataset"
    if kind != "retrieval":
        names = find_classnames(name, classnames, known, folder)
        names, entries = _in_subset(names, entries, tars, known)
        _check_labels(names, entries, tars, folder / CLASSNAMES)
        prompts = find_templates(name, templates, known, folder)
        source = _source_of(templates, classnames)
    samples = tuple(_sample(entry, tars, kind) for entry in entries)
    opened = EvalSet(
        *(name, kind, samples, names, prompts),
        fingerprint=_digest(crop_px, [(e.key, e.sha256, e.answer) for e in entries], names),
        images_digest=_digest(crop_px, [(e.key, e.sha256) for e in entries]),
        known=known,
        prompts_source=source,
        crop_px=crop_px,
    )
    return replace(opened, warnings=tuple(_unexpected(opened)))


def kind_of(folder: Path) -> Kind:
    """What kind of set lies in `folder`.

    Raises:
        InputError: its dataset_type.txt has another word.
    """
    path = folder / DATASET_TYPE
    found = path.read_text().strip().lower() if path.is_file() else "classification"
    for kind in _ANSWERS:
        if found == kind:
            return kind  # type: ignore[return-value]
    raise InputError(f"{path} must hold one of {', '.join(_ANSWERS)}, got '{found[:40]}'")


def find_tars(folder: Path) -> list[Path]:
    """The tars of the set in `folder`, in their order.

    Raises:
        InputError: the folder holds no set, or a tar is missing.
    """
    count_file = folder / SPLIT / SHARDS
    try:
        count = int(count_file.read_text())
    except FileNotFoundError:
        raise InputError(
            f"{folder} is no evaluation set: {count_file} is missing (expected the published "
            "webdataset layout, test/nshards.txt beside test/0.tar)"
        ) from None
    except ValueError:
        raise InputError(f"{count_file} must hold one number, the number of tars") from None
    tars = [folder / SPLIT / f"{index}.tar" for index in range(count)]
    for tar in tars:
        if not tar.is_file():
            raise InputError(f"{tar} is missing: {count_file} says there are {count} tars")
    return tars


class _Entry(NamedTuple):
    """One sample of the index, as it is kept."""

    key: str
    tar: int
    """Number of its tar."""
    offset: int
    size: int
    sha256: str
    answer: Any
    """Label; or [number of classes, [labels]]; or captions."""


def _index(tars: Sequence[Path], kind: Kind, cache: Path | None) -> list[_Entry]:
    """The samples of all tars, by their keys: the kept index where it is still right."""
    stamps = [[str(tar.resolve()), tar.stat().st_size, tar.stat().st_mtime_ns] for tar in tars]
    mark = {"version": _INDEX_VERSION, "kind": kind, "tars": stamps}
    if cache is None:
        return _read(tars, kind)
    name = hashlib.sha256(json.dumps([kind, str(tars[0].resolve())] if tars else kind).encode())
    path = cache / f"{name.hexdigest()[:16]}.json"
    kept = _kept(path, mark)
    if kept is not None:
        return kept
    entries = _read(tars, kind)
    cache.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({**mark, "samples": entries}, ensure_ascii=False))
    return entries


def _kept(path: Path, mark: dict[str, Any]) -> list[_Entry] | None:
    try:
        found = json.loads(path.read_text())
        if {key: found[key] for key in mark} != mark:
            return None
        return [_Entry(*sample) for sample in found["samples"]]
    except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged: read the tars
        return None


def _read(tars: Sequence[Path], kind: Kind) -> list[_Entry]:
    numbers = range(len(tars))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "index") as pool:
        by_tar = list(pool.map(lambda number: _entries(number, tars[number], kind), numbers))
    found: dict[str, _Entry] = {}
    for tar, entries in zip(tars, by_tar, strict=True):
        for entry in entries:
            if found.setdefault(entry.key, entry) is not entry:
                raise InputError(f"{tar}: sample {entry.key} occurs twice in this set")
    return [found[key] for key in sorted(found)]


def _entries(number: int, tar: Path, kind: Kind) -> list[_Entry]:
    return [_entry(number, tar, key, members, kind) for key, members in _members(tar).items()]


class _Member(NamedTuple):
    offset: int
    size: int
    sha256: str
    content: bytes
    """Of an answer; images are not kept."""


def _members(tar: Path) -> dict[str, dict[str, _Member]]:
    """Key -> extension -> member, in tar order."""
    found: dict[str, dict[str, _Member]] = {}
    size = tar.stat().st_size
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isfile() else None
                if content is None:
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                key, extension = f"{folder}/{stem}" if folder else stem, extension.lower()
                members = found.setdefault(key, {})
                if extension in members:
                    raise InputError(f"{tar}: member {member.name} occurs twice")
                data = content.read()
                is_image = extension in IMAGE_EXTENSIONS
                members[extension] = _Member(
                    *(member.offset_data, member.size),
                    hashlib.sha256(data).hexdigest() if is_image else "",
                    b"" if is_image else data,
                )
    except tarfile.TarError as error:
        raise InputError(
            f"{tar} cannot be read as a tar ({error}): fetch it again, it may be incomplete"
        ) from None
    return found


def _entry(number: int, tar: Path, key: str, members: dict[str, _Member], kind: Kind) -> _Entry:
    images = [member for extension, member in members.items() if extension in IMAGE_EXTENSIONS]
    if len(images) != 1:
        raise InputError(f"{tar}: sample {key} has {len(images)} images, expected one")
    wanted = _ANSWERS[kind]
    if wanted not in members:
        raise InputError(f"{tar}: sample {key} has no .{wanted} member")
    answer = _READERS[kind](members[wanted].content, f"{tar}: {key}")
    return _Entry(key, number, images[0].offset, images[0].size, images[0].sha256, answer)


def _label(content: bytes, where: str) -> int:
    text = content.decode("utf-8", "replace").strip()
    if not text.isdecimal():
        raise InputError(f"{where}.cls must hold a class number, got {text[:20]!r}")
    return int(text)


def _labels(content: bytes, where: str) -> list[Any]:
    """[number of classes, [classes]] of a 0/1 vector."""
    try:
        vector = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{where}.npy cannot be read as a vector ({error})") from None
    if vector.ndim != 1 or not np.isin(vector, (0, 1)).all():
        raise InputError(f"{where}.npy must hold one 0 or 1 a class, got shape {vector.shape}")
    return [len(vector), np.flatnonzero(vector).tolist()]


def _captions(content: bytes, where: str) -> list[str]:
    lines = content.decode("utf-8", "replace").split("\n")
    captions = [line.replace("\\n", "\n").strip() for line in lines]
    captions = [caption for caption in captions if caption]
    if not captions:
        raise InputError(f"{where}.txt holds no caption")
    return captions


_READERS = {"classification": _label, "multilabel": _labels, "retrieval": _captions}


def _in_subset(
    names: tuple[str, ...], entries: list[_Entry], tars: Sequence[Path], known: KnownSet | None
) -> tuple[tuple[str, ...], list[_Entry]]:
    """Names and labels that count the classes of a subset of ImageNet only, in ImageNet's order.

    They come like that from published sets; labels of the thousand, as of a folder of ImageNet's
    form, are renumbered.
    """
    classes = subset_classes(known)
    if known is None or not classes:
        return names, entries
    if len(names) not in (len(classes), _THOUSAND):
        raise InputError(
            f"set '{known.key}' has {len(classes)} classes, but {len(names)} class names: give "
            f"those, or ImageNet's {_THOUSAND}"
        )
    if len(names) == len(classes) and all(entry.answer < len(classes) for entry in entries):
        return names, entries
    place = {label: index for index, label in enumerate(classes)}
    for entry in entries:
        if entry.answer not in place:
            raise InputError(
                f"{tars[entry.tar]}: sample {entry.key} has label {entry.answer}, which is none "
                f"of the {len(classes)} classes of '{known.key}' among ImageNet's {_THOUSAND}"
            )
    kept = tuple(names[label] for label in classes) if len(names) == _THOUSAND else names
    return kept, [entry._replace(answer=place[entry.answer]) for entry in entries]


def _check_labels(
    names: tuple[str, ...], entries: Sequence[_Entry], tars: Sequence[Path], where: Path
) -> None:
    for entry in entries:
        if isinstance(entry.answer, int):
            if entry.answer >= len(names):
                raise InputError(
                    f"{tars[entry.tar]}: sample {entry.key} has label {entry.answer}, but "
                    f"{where} names {len(names)} classes, counted from 0"
                )
        elif entry.answer[0] != len(names):
            raise InputError(
                f"{tars[entry.tar]}: {entry.key}.npy is for {entry.answer[0]} classes, but "
                f"{where} names {len(names)}"
            )


def _sample(entry: _Entry, tars: Sequence[Path], kind: Kind) -> EvalSample:
    span = Span(tars[entry.tar], entry.offset, entry.size)
    if kind == "classification":
        return EvalSample(entry.key, span, label=entry.answer, sha256=entry.sha256)
    if kind == "multilabel":
        labels = tuple(entry.answer[1])
        return EvalSample(entry.key, span, labels=labels, sha256=entry.sha256)
    return EvalSample(entry.key, span, captions=tuple(entry.answer), sha256=entry.sha256)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _source_of(
    templates: PromptSource | Sequence[str], classnames: NameSource | Sequence[str]
) -> str:
    prompts, names = (one if isinstance(one, str) else "user" for one in (templates, classnames))
    return prompts if names == "dataset" else f"{prompts}, class names {names}"


def _unexpected(evalset: EvalSet) -> list[str]:
    """What differs from the registry's entry."""
    known = evalset.known
    if known is None:
        return []
    captions = sum(len(sample.captions) for sample in evalset.samples)
    usual = known.prompts[0] if known.prompts else ""
    is_usual = evalset.prompts_source.split(",")[0] == usual
    note = f" ({known.n_note})" if known.n_note else ""
    return [
        f"{found:,} {what}, where the known set has {expected:,}{remark}"
        for found, expected, what, remark in (
            (len(evalset), known.n, "images", note),
            (captions, known.captions, "captions", ""),
            (len(evalset.classnames), known.classes, "classes", ""),
            (len(evalset.templates), known.templates if is_usual else None, "templates", ""),
        )
        if expected is not None and found != expected
    ]
