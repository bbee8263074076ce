"""Evaluation sets in the published webdataset layout, read through a tar member index.

Such sets have few shards, so they are never split by tar: samples are addressed one by one, in the
order of their keys, and every one of them is evaluated exactly once. The same samples are the same
set in however many tars. Also a look at a set, and at what is odd about it, before an evaluation.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from evaclip_model.errors import InputError, shorten_error
from evaclip_model.files import write_atomically
from evaclip_model.reading.image_decoder import UnreadableImageError, decode_image
from evaclip_model.zeroshot import set_layout
from tasks.evaluate.sets.choice_questions import Question, read_questions
from tasks.evaluate.sets.class_order import list_of_known, normalise_name
from tasks.evaluate.sets.prompts import find_classnames, find_templates, subset_classes
from tasks.evaluate.sets.set_registry import CLASS_KINDS, Kind, KnownSet, NameSource, PromptSource
from tasks.progress import Report, report_nothing

if TYPE_CHECKING:
    from tasks.evaluate.metrics.metric import Metric

_ANSWERS = {"classification": "cls", "multilabel": "npy", "retrieval": "txt", "choice": ""}
"""Kind -> extension of the member that says what is right; questions have a file of their own."""
_INDEX_VERSION = 2
_THOUSAND = 1000
SHOWN = 3
"""Examples of each oddity."""
_ODD_NAMES = (
    ("are numbers", re.compile(r"^\d+$")),
    ("are WordNet ids", re.compile(r"^n\d{8}")),
    ("begin with a number", re.compile(r"^\d+[._-]")),
    ("have an underscore", re.compile("_")),
    ("look like files", re.compile(r"\.(jpe?g|png|webp|txt)$", re.I)),
    ("have spaces or quotes at an end", re.compile(r"""^[\s"']|[\s"']$""")),
)


@dataclass(frozen=True)
class EvalSample:
    key: str
    image: set_layout.Span
    label: int = -1
    """Line of the class in classnames.txt, from 0; -1 in a set of another kind."""
    labels: tuple[int, ...] = ()
    """All its classes in a multilabel set, rising; an image may have none."""
    captions: tuple[str, ...] = ()
    group: int = -1
    """The first number of a `.npy` beside the label, as a region or an income; -1 without one."""
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
    prompts_source: str = "dataset"
    """Source of its templates, and of its class names where that is another one."""
    crop_px: int = 0
    """Pixels that whoever decodes an image of this set must cut off every side first."""
    warnings: tuple[str, ...] = ()
    """Sentences on what is unexpected about the set itself."""
    train: EvalSet | None = None
    """Its part that probes learn from, where that was asked for and is there."""
    probes: tuple[str, ...] = ()
    """Figures of the probes that learn from it."""
    own_metrics: tuple[Metric, ...] = ()
    """Metrics of the user's own, besides those of its kind."""
    questions: tuple[Question, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def captions(self) -> list[str]:
        """The texts that images are compared with as they are: a retrieval set's, image by image,
        or a choice set's, question by question."""
        owners = [one.captions for one in self.samples] + [one.texts for one in self.questions]
        return [text for texts in owners for text in texts]


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
    """Index the set in `folder`. Raises InputError: it is damaged, of another kind, or a source
    lacks it.

    Args:
        templates: prompts of a set with classes: a source's name, or the list itself.
        classnames: likewise, in the order of the labels.
        index_cache: folder that keeps the index, so that the tars are read once; an index is used
            as long as their sizes and times of change are the same.
    """
    found = kind_of(folder)
    if found != kind:
        raise InputError(
            f"evaluation set '{name}' is declared as {kind}, but {folder} is a {found} set: "
            "correct its kind in the recipe"
        )
    tars = set_layout.find_tars(folder)
    entries = _open_index(tars, kind, index_cache)
    if not entries:
        raise InputError(f"evaluation set '{name}' has no sample in {folder / set_layout.SPLIT}")
    names: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    source = "dataset"
    if kind in CLASS_KINDS:
        names = find_classnames(name, classnames, known, folder)
        names, entries = _in_subset(names, entries, tars, known)
        _check_labels(names, entries, tars, folder / set_layout.CLASSNAMES)
        if kind == "multilabel" and not any(entry.answer[1] for entry in entries):
            raise InputError(
                f"evaluation set '{name}': no image in {folder / set_layout.SPLIT} has a class, so "
                "there is no precision to measure: each .npy needs a 1 for every class that its "
                "image shows"
            )
        prompts = find_templates(name, templates, known, folder)
        source, listed = (
            one if isinstance(one, str) else "user" for one in (templates, classnames)
        )
        source += "" if listed == "dataset" else f", class names {listed}"
    samples = tuple(_read_sample(entry, tars, kind) for entry in entries)
    questions = read_questions(folder, [e.key for e in entries]) if kind == "choice" else ()
    asked = [[one.model_dump(mode="json") for one in questions]] if questions else []
    answers = [(e.key, e.sha256, e.answer, *([e.group] if e.group >= 0 else [])) for e in entries]
    opened = EvalSet(
        *(name, kind, samples, names, prompts),
        fingerprint=_digest_entries(crop_px, answers, names, *asked),
        images_digest=_digest_entries(crop_px, [(e.key, e.sha256) for e in entries]),
        known=known,
        prompts_source=source,
        crop_px=crop_px,
        questions=questions,
    )
    return replace(opened, warnings=tuple(_list_unexpected(opened)))


def open_train_part(
    evalset: EvalSet, folder: Path, index_cache: Path | None = None
) -> EvalSet | None:
    """The part of a classification set that probes learn from, with the set's own class numbers;
    None where it has none. Raises InputError: it is unreadable or a link, or a class of it is not
    one of the set's."""
    part = folder / set_layout.TRAIN
    if evalset.kind != "classification" or not part.is_dir():
        return None
    if part.is_symlink():  # what a link leads to is in no fingerprint of the set
        raise InputError(f"{part} is a link: put the folder itself there (cp -al takes no space)")
    is_set = (part / set_layout.SPLIT).is_dir()
    tars = set_layout.find_tars(part) if is_set else set_layout.find_tars(folder, set_layout.TRAIN)
    entries = _open_index(tars, evalset.kind, index_cache)
    here, there = evalset.classnames, part / set_layout.CLASSNAMES
    if (folder / set_layout.CLASSNAMES).is_file():
        here = set_layout.read_lines(folder / set_layout.CLASSNAMES, "one class name a line")
    names = set_layout.read_lines(there, "one class name a line") if is_set else here
    if names != here:
        place = {normalise_name(name): label for label, name in enumerate(here)}
        for name in names:
            if normalise_name(name) not in place:
                raise InputError(f"{there} names '{name}', which is not a class of {folder}")
        labels = [place[normalise_name(name)] for name in names]
        entries = [one._replace(answer=labels[one.answer]) for one in entries]
    _check_labels(evalset.classnames, entries, tars, folder / set_layout.CLASSNAMES)
    return replace(
        evalset,
        name=f"{evalset.name}/{set_layout.TRAIN}",
        samples=tuple(_read_sample(entry, tars, evalset.kind) for entry in entries),
        images_digest=_digest_entries(evalset.crop_px, [(e.key, e.sha256) for e in entries]),
        warnings=(),
    )


def kind_of(folder: Path) -> Kind:
    """The kind of the set in `folder`. Raises InputError: its dataset_type.txt has another word."""
    path = folder / set_layout.DATASET_TYPE
    if not path.is_file():
        return "classification"
    found = path.read_text(errors="replace").strip().lower()
    for kind in get_args(Kind):
        if found == kind:
            return kind  # type: ignore[no-any-return]
    raise InputError(f"{path} must hold one of {', '.join(_ANSWERS)}, got '{found[:40]}'")


class _Indexed(NamedTuple):
    key: str
    tar: int
    offset: int
    size: int
    sha256: str
    answer: Any
    """Label; or [number of classes, [labels]]; or captions."""
    group: int = -1


def _open_index(tars: Sequence[Path], kind: Kind, cache: Path | None) -> list[_Indexed]:
    """The samples of all tars, by their keys: the kept index where it is still right."""
    if cache is None:
        return _read_tars(tars, kind)
    stamps = [[str(tar.resolve()), tar.stat().st_size, tar.stat().st_mtime_ns] for tar in tars]
    mark = {"version": _INDEX_VERSION, "kind": kind, "tars": stamps}
    name = hashlib.sha256(json.dumps([kind, stamps[0][0]] if tars else kind).encode())
    path = cache / f"{name.hexdigest()[:16]}.json"
    # Not there, or damaged: read the tars.
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(path.read_text())
        if {key: found[key] for key in mark} == mark:
            return [_Indexed(*sample) for sample in found["samples"]]
    entries = _read_tars(tars, kind)
    cache.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({**mark, "samples": entries}, ensure_ascii=False))
    return entries


def _read_tars(tars: Sequence[Path], kind: Kind) -> list[_Indexed]:
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "index") as pool:
        by_tar = pool.map(lambda n: list(_read_entries(n, tars[n], kind)), range(len(tars)))
        entries = sorted(chain.from_iterable(by_tar), key=lambda entry: entry.key)
    for before, entry in pairwise(entries):
        if before.key == entry.key:
            raise InputError(f"{tars[entry.tar]}: sample {entry.key} occurs twice in this set")
    return entries


def _read_entries(number: int, tar: Path, kind: Kind) -> Iterator[_Indexed]:
    wanted = _ANSWERS[kind]
    for key, members in set_layout.read_members(tar, digest_images=True).items():
        image = set_layout.find_image(members, f"{tar}: sample {key}")
        if wanted and wanted not in members:
            raise InputError(f"{tar}: sample {key} has no .{wanted} member")
        answer = _READERS[kind](members[wanted].content, f"{tar}: {key}") if wanted else []
        span, group = image.span, -1
        if kind == "classification" and "npy" in members:
            with suppress(Exception):  # numpy's parsers raise many kinds
                vector = _read_array(members["npy"].content)
                group = int(vector.flat[0]) if vector.size and vector.dtype.kind in "iu" else -1
        yield _Indexed(key, number, span.offset, span.size, image.sha256, answer, group)


def _read_array(content: bytes) -> npt.NDArray[Any]:
    """The array of a .npy file. By hand: numpy would allocate whatever size a header promises.
    Raises Exception: of many kinds, where it holds none."""
    file = io.BytesIO(content)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another version of the format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    vector = np.frombuffer(file.read(), dtype)
    if len(vector) != math.prod(shape):
        raise ValueError(f"its header promises {math.prod(shape):,} numbers")
    return vector.reshape(shape)


def _parse_labels(content: bytes, where: str) -> list[Any]:
    """[number of classes, [classes]] of a 0/1 vector."""
    try:
        vector = _read_array(content)
    except Exception as error:  # numpy hands a header to Python's parsers, which raise many kinds
        reason = shorten_error(error)
        raise InputError(f"{where}.npy cannot be read as a vector ({reason})") from None
    if vector.ndim != 1 or vector.dtype.kind not in "biuf" or not np.isin(vector, (0, 1)).all():
        raise InputError(f"{where}.npy must hold one 0 or 1 a class, got shape {vector.shape}")
    return [len(vector), np.flatnonzero(vector).tolist()]


def _parse_captions(content: bytes, where: str) -> list[str]:
    lines = content.decode("utf-8", "replace").split("\n")
    found = [line.replace("\\n", "\n").strip() for line in lines]
    captions = [caption for caption in found if caption]
    if not captions:
        raise InputError(f"{where}.txt holds no caption")
    return captions


_READERS = {
    "classification": set_layout.read_label,
    "multilabel": _parse_labels,
    "retrieval": _parse_captions,
}


def _in_subset(
    names: tuple[str, ...], entries: list[_Indexed], tars: Sequence[Path], known: KnownSet | None
) -> tuple[tuple[str, ...], list[_Indexed]]:
    """Names and labels that count the classes of a subset of ImageNet only, in ImageNet's order, as
    published sets do; labels of the thousand, as of a folder of ImageNet's form, are renumbered."""
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
                f"{tars[entry.tar]}: sample {entry.key} has label {entry.answer}, which is not "
                f"one of the {len(classes)} classes of '{known.key}' among ImageNet's {_THOUSAND}"
            )
    kept = tuple(names[label] for label in classes) if len(names) == _THOUSAND else names
    return kept, [entry._replace(answer=place[entry.answer]) for entry in entries]


def _check_labels(
    names: tuple[str, ...], entries: Sequence[_Indexed], tars: Sequence[Path], where: Path
) -> None:
    for entry in entries:
        answer, count = entry.answer, len(names)
        if isinstance(answer, int) and answer >= count:
            raise InputError(
                f"{tars[entry.tar]}: sample {entry.key} has label {answer}, but {where} names "
                f"{count} classes, counted from 0"
            )
        if isinstance(answer, list) and answer[0] != count:
            raise InputError(
                f"{tars[entry.tar]}: {entry.key}.npy is for {answer[0]} classes, but {where} names "
                f"{count}"
            )


def _read_sample(entry: _Indexed, tars: Sequence[Path], kind: Kind) -> EvalSample:
    span = set_layout.Span(tars[entry.tar], entry.offset, entry.size)
    return EvalSample(
        *(entry.key, span),
        label=entry.answer if kind == "classification" else -1,
        labels=tuple(entry.answer[1]) if kind == "multilabel" else (),
        captions=tuple(entry.answer) if kind == "retrieval" else (),
        group=entry.group,
        sha256=entry.sha256,
    )


def _digest_entries(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _list_unexpected(evalset: EvalSet) -> list[str]:
    known = evalset.known
    if known is None:
        return []
    captions = len(evalset.captions)
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


def check_set(evalset: EvalSet, report: Report = report_nothing) -> dict[str, str]:
    """Decode every image of a set: the keys of those that cannot be, with the reason."""
    unreadable = {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "check") as pool:
        results = pool.map(_decode_reason, evalset.samples)
        for done, (sample, reason) in enumerate(zip(evalset.samples, results, strict=True), 1):
            if reason:
                unreadable[sample.key] = reason
            report(done, len(evalset), sample.key)
    return unreadable


def _decode_reason(sample: EvalSample) -> str:
    try:
        decode_image(sample.image.read())
    except UnreadableImageError as error:
        return str(error)
    return ""


def list_facts(evalset: EvalSet) -> Iterator[tuple[str, str]]:
    """(what, value) of kind, size, names, prompts and fingerprint."""
    one = evalset
    yield "kind", one.kind
    yield "images", f"{len(one):,} in {len({sample.image.tar for sample in one.samples})} tars"
    if one.questions:
        yield "questions", f"{len(one.questions):,}: {one.questions[0].form}"
    if not one.classnames:
        yield "captions", f"{len(one.captions):,}"
    else:
        yield "classes", f"{len(one.classnames):,}: {some_names(one.classnames)}"
        yield "templates", f"{len(one.templates)} ({one.prompts_source}): {one.templates[0]}"
    yield "fingerprint", one.fingerprint


def list_oddities(evalset: EvalSet, unreadable: Mapping[str, str]) -> Iterator[str]:
    """Sentences on what is odd, `unreadable` images among it."""
    yield from evalset.warnings
    known, names = evalset.known, evalset.classnames
    if known is not None and not known.split_stated:
        yield f"the paper does not say which images these are: {known.split}"
    if names:
        yield from odd_names(names, known)
        seen = {label for one in evalset.samples for label in (one.label, *one.labels)}
        empty = [name for label, name in enumerate(names) if label not in seen]
        yield from _count_odd(empty, "classes have no image")
    if again := len(evalset) - len({sample.sha256 for sample in evalset.samples}):
        yield f"{again:,} images are copies of others, byte by byte"
    texts = Counter(text for sample in evalset.samples for text in set(sample.captions))
    if shared := sum(count > 1 for count in texts.values()):
        yield f"{shared:,} captions belong to several images word for word: exact ties"
    reasons = [f"{key} ({reason})" for key, reason in unreadable.items()]
    yield from _count_odd(reasons, "images cannot be decoded")


def odd_names(classnames: Sequence[str], known: KnownSet | None) -> Iterator[str]:
    names = Counter(classnames)
    shared = [name for name, count in names.items() if count > 1]
    yield from _count_odd(shared, "names stand for several classes, which tie exactly")
    spellings: dict[str, list[str]] = {}
    for name in names:
        spellings.setdefault(normalise_name(name), []).append(name)
    alike = [" and ".join(each) for each in spellings.values() if len(each) > 1]
    yield from _count_odd(alike, "names differ from another in case or punctuation alone")
    for what, pattern in () if known and known.key == "mnist" else _ODD_NAMES:
        odd = [name for name in names if pattern.search(name)]
        yield from _count_odd(odd, f"names {what}, which a text tower reads as they stand")
    yield from _compare_with_known(classnames, known)


def some_names(names: Sequence[str]) -> str:
    """The first and the last names of a list; all where they are few."""
    if len(names) <= 2 * SHOWN:
        return ", ".join(names)
    return f"{', '.join(names[:SHOWN])} ... {', '.join(names[-SHOWN:])}"


def _compare_with_known(classnames: Sequence[str], known: KnownSet | None) -> Iterator[str]:
    """Names against the known set's own list, where that is installed and of the same words."""
    listed = list_of_known(known)
    if listed is None or known is None:
        return
    own, others = ([normalise_name(name) for name in one] for one in (classnames, listed.names))
    if own == others:
        return
    if sorted(own) == sorted(others):
        pairs = zip(classnames, own, others, strict=True)
        moved = [name for name, key, other in pairs if key != other]
        (elsewhere,) = _count_odd(moved, "stand elsewhere")
        yield (
            f"the names are those of {listed.source}'s list in another order ({elsewhere}): right "
            "where the labels follow this order"
        )
    else:
        extra = [name for name, key in zip(classnames, own, strict=True) if key not in others]
        yield from _count_odd(extra, f"names are not in {listed.source}'s list of '{known.key}'")


def _count_odd(items: Sequence[str], what: str) -> Iterator[str]:
    if items:
        more = f" and {len(items) - SHOWN:,} more" if len(items) > SHOWN else ""
        yield f"{len(items):,} {what}: {', '.join(items[:SHOWN])}{more}"
