"""Writing an evaluation set in the published webdataset layout, which CLIP_benchmark reads too.

A set grows in a hidden folder beside its place and is renamed when it is whole. A tar depends on
its own sources only and carries no times, so the same sources give the same bytes, in one go or
in several. The same command over changed sources makes the set anew.
"""

import io
import json
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from evaclip_model.errors import InputError
from evaclip_model.files import lock_file, replace_file, write_atomically
from evaclip_model.reading.image_decoder import UnreadableImageError, decode_image
from evaclip_model.zeroshot import set_layout
from tasks.evaluate.sets.choice_questions import QUESTIONS, Question
from tasks.evaluate.sets.set_registry import Kind
from tasks.progress import Report, report_nothing

CONVERSION = "conversion.json"
"""The sources and settings of a set: readers of the layout pass over it."""
FAILURES = "failures.txt"
"""`SOURCE<tab>REASON` of every source that gave no image; absent if there is none."""
REMARKS = "remarks.txt"
"""`SOURCE<tab>REMARK` of sources that were used and are odd; absent if there is none."""
IMAGES_PER_TAR = 1000
"""Sources a tar; what a kill costs at most."""

_COPIED = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""Format of an image file -> its extension in a tar; other formats become PNG."""
_RECORDS = "records"
_QUESTION = "question "


class UnusableSourceError(ValueError):
    """This source gives no image; the set is made without it, and it is listed."""


@dataclass(frozen=True)
class Found:
    image: bytes
    extension: str
    answer: int | None = None
    """Label, where only reading tells it: a data set object's."""
    remark: str = ""


@dataclass(frozen=True)
class Source:
    """One sample to be."""

    name: str
    """Its name in the list of failures."""
    read: Callable[[], Found]
    """Called in a thread; raises UnusableSourceError."""
    stamp: str = ""
    """Changes with its content, as a file's size and time of change do."""
    answer: Any = ()
    """Label; or labels (multilabel); or captions; in a `LabelTable` the words of its classes."""


Read = tuple[str, Source, Found | UnusableSourceError]
"""Key of a sample, its source and what that gave."""


@dataclass(frozen=True)
class Conversion:
    folder: Path
    images: int
    tars: int
    failures: tuple[tuple[str, str], ...]
    """(source, reason)"""
    remarks: tuple[tuple[str, str], ...]
    classnames: tuple[str, ...] = ()
    about_names: tuple[str, ...] = ()
    """Sentences on how names and classes were joined, where that is not plain."""
    questions: int = 0
    """Of a choice set, those left out not counted."""
    again: bool = False
    """True: it took the place of a set that the same command had made of other sources."""

    def left_out(self) -> dict[str, int]:
        """Number of sources that gave no image, by reason, the most frequent first."""
        return dict(Counter(reason for _, reason in self.failures).most_common())


def write_set(
    folder: Path,
    sources: Sequence[Source],
    *,
    kind: Kind,
    plan: Any,
    classnames: Sequence[str] = (),
    templates: Sequence[str] = (),
    questions: Sequence[Question] = (),
    images_per_tar: int = IMAGES_PER_TAR,
    report: Report = report_nothing,
) -> Conversion:
    """Write the set of all `sources`, in their order, or go on where a killed run stopped. Raises
    InputError: the folder holds something else, no source can be used, or another run writes here.

    Args:
        plan: what decides the content, as JSON: another plan starts anew. With an `origin` in it,
            a finished set of the same origin is replaced when anything else differs.
        classnames: of a set with classes, in the order of labels.
        questions: of a choice set, which call images by the names of sources; one of an image that
            cannot be used is left out too.
    """
    decides = {"kind": kind, "plan": plan, "images_per_tar": images_per_tar}
    decides |= {"classnames": list(classnames), "templates": list(templates)}
    if questions:
        decides["questions"] = [one.model_dump() for one in questions]
    decides = json.loads(json.dumps(decides))  # as it comes back from the file
    replaced = folder.exists() and [path.name for path in folder.iterdir()] != [set_layout.TRAIN]
    if replaced and (finished := _read_finished(folder, decides)):
        return finished
    growing = folder.with_name(f".{folder.name}.part")
    growing.mkdir(parents=True, exist_ok=True)
    if (lock := lock_file(growing / ".lock")) is None:
        raise InputError(f"another run is writing {growing}: wait for it, or stop it")
    with lock:
        _start_folder(growing, decides)
        keys = [f"s{place:07d}" for place in range(len(sources))]
        records: list[dict[str, Any]] = []

        def read_part(first: int, part: Sequence[Source]) -> Iterator[Read]:
            results = zip(keys[first:], part, pool.map(_read_source, part), strict=False)
            for done, (key, source, found) in enumerate(results, first + 1):
                yield key, source, found
                report(done, len(sources), source.name)

        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "convert") as pool:
            for number, first in enumerate(range(0, len(sources), images_per_tar)):
                part = sources[first : first + images_per_tar]
                done = growing / _RECORDS / f"{number}.json"  # written after its tar
                if not done.exists():
                    tar = growing / set_layout.SPLIT / f"{number}.tar"
                    record = _write_tar(tar, read_part(first, part), kind, len(classnames))
                    write_atomically(done, json.dumps(record, ensure_ascii=False))
                records.append(json.loads(done.read_text()))
                report(first + len(part), len(sources), folder.name)
        names = (source.name for source in sources)
        made = _close_set(growing, folder, decides, records, dict(zip(names, keys, strict=True)))
    return replace(made, again=replaced)


def image_file(content: bytes) -> Found:
    """An image file as it goes into a tar. Raises UnusableSourceError: it cannot be decoded."""
    try:
        image = decode_image(content)
    except UnreadableImageError as error:
        # Pillow names the object it read from, by its address.
        raise UnusableSourceError(re.sub(r" <_io[^>]*>", "", f"is not an image: {error}")) from None
    extension = _COPIED.get(image.format or "")
    return Found(content, extension) if extension else Found(encode_png(image), "png")


def encode_png(image: Image.Image) -> bytes:
    """An image without loss, in its own mode where PNG has it."""
    out = io.BytesIO()
    kept = image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else None
    (kept or image.convert("RGB")).save(out, "PNG", compress_level=3)
    return out.getvalue()


def _start_folder(growing: Path, decides: dict[str, Any]) -> None:
    """Keep what is there if it is of the same plan, and empty the folder if it is not."""
    path = growing / CONVERSION
    if path.exists() and json.loads(path.read_text())["decides"] == decides:
        return
    for entry in growing.iterdir():
        if entry.is_dir() and entry.name != set_layout.TRAIN:
            shutil.rmtree(entry)
        elif entry.is_file() and entry.name != ".lock":
            entry.unlink()
    (growing / set_layout.SPLIT).mkdir()
    (growing / _RECORDS).mkdir()
    write_atomically(path, json.dumps({"decides": decides}, ensure_ascii=False))


def _write_tar(path: Path, read: Iterable[Read], kind: Kind, classes: int) -> dict[str, Any]:
    record: dict[str, Any] = {"images": 0, "failures": [], "remarks": []}
    with (
        # One name, as only one run writes here: what a killed run left is written over.
        replace_file(path, beside=path.with_name(f".{path.name}.part")) as beside,
        tarfile.open(beside, "w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for key, source, found in read:
            if isinstance(found, UnusableSourceError):
                record["failures"].append((source.name, str(found)))
                continue
            record["images"] += 1
            if found.remark:
                record["remarks"].append((source.name, found.remark))
            answer = source.answer if found.answer is None else found.answer
            members = {found.extension: found.image, **_answer_member(answer, kind, classes)}
            for extension, data in members.items():
                # Its time and owner are zero: the same bytes every time.
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return record


def _read_source(source: Source) -> Found | UnusableSourceError:
    try:
        return source.read()
    except UnusableSourceError as error:
        return error
    except OSError as error:
        return UnusableSourceError(f"cannot be read: {error.strerror or error}")


def _answer_member(answer: Any, kind: Kind, classes: int) -> dict[str, bytes]:
    """Extension and content of the member that says what is right; none in a choice set."""
    if kind == "classification":
        return {"cls": str(answer).encode()}
    if kind == "multilabel":
        vector, out = np.zeros(classes, np.int64), io.BytesIO()
        vector[list(answer)] = 1
        np.save(out, vector)
        return {"npy": out.getvalue()}
    if kind == "retrieval":
        # CLIP_benchmark parts captions at every line separator that Python knows of.
        lines = [r"\n".join(caption.strip().splitlines()) for caption in answer]
        return {"txt": "\n".join(lines).encode()}
    return {}


def _close_set(
    growing: Path,
    folder: Path,
    decides: dict[str, Any],
    records: list[dict[str, Any]],
    keys: Mapping[str, str],
) -> Conversion:
    """Write what belongs to the whole set, and put it in its place; `keys` are those of sources."""
    if "questions" in decides:
        gone = {name for record in records for name, _ in record["failures"]}
        lost, lines = [], []
        for number, asked in enumerate(decides["questions"], 1):
            if gone.isdisjoint(asked["images"]):
                asked = {**asked, "images": [keys[name] for name in asked["images"]]}
                lines.append(json.dumps(asked, ensure_ascii=False) + "\n")
            else:
                lost.append([f"{_QUESTION}{number}", "is of an image that cannot be used"])
        records[0]["failures"] += lost
        write_atomically(growing / QUESTIONS, "".join(lines))
    made = _make_conversion(folder, records, decides)
    if not made.images:
        why = " (the first, {}, {})".format(*made.failures[0]) if made.failures else ""
        raise InputError(f"no image for {folder}: none of {len(made.failures)} could be used{why}")
    for name, lines in (
        (set_layout.CLASSNAMES, decides["classnames"]),
        (set_layout.TEMPLATES, decides["templates"]),
    ):
        if lines:
            write_atomically(growing / name, "".join(f"{line}\n" for line in lines))
    if decides["kind"] != "classification":
        write_atomically(growing / set_layout.DATASET_TYPE, f"{decides['kind']}\n")
    for name, listed in ((FAILURES, made.failures), (REMARKS, made.remarks)):
        if listed:
            text = "".join("\t".join(" ".join(p.split()) for p in one) + "\n" for one in listed)
            write_atomically(growing / name, text)
    write_atomically(growing / set_layout.SPLIT / set_layout.SHARDS, f"{len(records)}\n")
    text = json.dumps({"decides": decides, "records": records}, ensure_ascii=False)
    write_atomically(growing / CONVERSION, text + "\n")
    shutil.rmtree(growing / _RECORDS)
    (growing / ".lock").unlink()
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        if (folder / set_layout.TRAIN).exists():  # it was converted by itself
            (folder / set_layout.TRAIN).replace(growing / set_layout.TRAIN)
        shutil.rmtree(old, ignore_errors=True)
        folder.replace(old)
    growing.replace(folder)
    shutil.rmtree(old, ignore_errors=True)
    return made


def _read_finished(folder: Path, decides: dict[str, Any]) -> Conversion | None:
    """The set that is there already; None where the same command made it of other sources. Raises
    InputError: something else is there."""
    path = folder / CONVERSION
    found = json.loads(path.read_text()) if path.is_file() else {}
    there = found.get("decides", {})
    if there == decides:
        return _make_conversion(folder, found["records"], decides)
    plans = [one for one in (there.get("plan"), decides["plan"]) if isinstance(one, dict)]
    origins = [one.get("origin") for one in plans]
    if len(origins) == 2 and origins[0] and origins[0] == origins[1]:
        return None
    raise InputError(
        f"{folder} is there already, and not from these sources: remove it, or name another folder"
    )


def _make_conversion(
    folder: Path, records: Sequence[dict[str, Any]], decides: dict[str, Any]
) -> Conversion:
    failures, remarks = (
        tuple((name, reason) for record in records for name, reason in record[kind])
        for kind in ("failures", "remarks")
    )
    images = sum(record["images"] for record in records)
    names = tuple(decides["classnames"])
    lost = sum(name.startswith(_QUESTION) for name, _ in failures)
    asked = max(0, len(decides.get("questions", ())) - lost)
    return Conversion(folder, images, len(records), failures, remarks, names, questions=asked)
