"""Images with captions from folders, tables and parquet files, one at a time, and their number;
what is none, and why. Not here: which files there are (find_source.py); packing; decoding, which
verification does.

Images keep their bytes. A pair's `uid` is a hash of its source, its image (the path as written, or
the bytes where there is none) and its caption: it stays the same wherever the source lies.
"""

import hashlib
import posixpath
from collections.abc import Iterator, Sequence
from contextlib import suppress
from enum import StrEnum
from itertools import accumulate, chain
from typing import Any, NamedTuple

from evaclip_model.errors import InputError
from evaclip_model.reading import samples, table_columns
from evaclip_model.reading.image_decoder import identify_format
from evaclip_model.reading.tar_file import BrokenTar
from evaclip_model.reading.urls import is_url, open_binary
from tasks.adopt import find_source as finding
from tasks.adopt.config import AdoptedSource
from tasks.adopt.find_source import FoundSource
from tasks.tables.parquet_tables import parquet_schema, read_parquet_rows
from tasks.tables.text_tables import column_names, parse_list, read_text_table, text_format

ROWS_AT_ONCE = 64


class PairFlaw(StrEnum):
    """The reason why a row or a file is not a pair, apart from `LineFlaw`."""

    NO_IMAGE = "no_image"
    NO_CAPTION = "no_caption"
    CAPTION_NOT_UTF8 = "caption_not_utf8"
    MISSING_FILE = "missing_file"
    OUTSIDE_FOLDER = "outside_folder"
    UNREADABLE_FILE = "unreadable_file"
    TOO_LARGE = "too_large"
    NOT_AN_IMAGE = "not_an_image"


class FoundPair(NamedTuple):
    image: bytes
    extension: str
    """One of `samples.IMAGE_EXTENSIONS`."""
    caption: str
    record: dict[str, str]


class NoPair(NamedTuple):
    """Content that was found instead of a pair, in a file, line or row of the user's own."""

    where: str
    reason: str


class _Row(NamedTuple):
    """One row of a table, as it lies there; `place` is "line 7" or "row 7"."""

    place: str
    image: Any
    captions: Sequence[Any]
    url: Any
    flaw: str | None = None


def read_pairs(found: FoundSource) -> Iterator[FoundPair | NoPair]:
    """Yield what a source of any form but shards holds, in the order of its files and rows; refuse
    a table that cannot be read or lacks a column."""
    if found.form == "folder":
        for captions, images in _group_by_stem(found):
            yield from _folder_pairs(found, captions, images)
    else:
        for file in found.files:
            for row in _iterate_rows(found, file):
                yield from _row_pairs(found, file, row)


def count_pairs(source: AdoptedSource, enough: int) -> int | None:
    """The pairs that a source has at most, counted until there are `enough`, without opening an
    image; None where only fetching or verifying its shards could tell."""
    found, counted = finding.find_source(source), 0
    if found.form == "shards" and any(map(is_url, found.files)):
        return None
    try:
        for counted in accumulate(_count_each(found)):
            if counted >= enough:
                break
    except (BrokenTar, OSError):
        return None
    return counted


def _count_each(found: FoundSource) -> Iterator[int]:
    if found.form == "shards":
        members = chain.from_iterable(map(finding.iterate_members, found.files))
        return map(int, map(finding.is_pair, members))
    if found.form == "folder":
        return (len(images) for captions, images in _group_by_stem(found) if captions)
    rows = (row for file in found.files for row in _iterate_rows(found, file, has_images=False))
    return (sum(map(bool, row.captions)) for row in rows if row.flaw is None)


def _group_by_stem(found: FoundSource) -> Iterator[tuple[list[str], list[str]]]:
    """(captions, images) of the files of a folder that differ in their suffix alone."""
    by_stem: dict[str, list[str]] = {}
    for file in found.files:
        by_stem.setdefault(file.rpartition(".")[0], []).append(file)
    for files in by_stem.values():
        ends = {file: file.rpartition(".")[2].lower() for file in files}
        captions = [one for end in samples.CAPTION_EXTENSIONS for one in files if ends[one] == end]
        yield captions, [file for file in files if file not in captions]


def _folder_pairs(
    found: FoundSource, captions: Sequence[str], images: Sequence[str]
) -> Iterator[FoundPair | NoPair]:
    if not captions:
        yield from (NoPair(image, PairFlaw.NO_CAPTION) for image in images)
    elif not images:
        yield NoPair(captions[0], PairFlaw.NO_IMAGE)
    else:
        content, caption = _read_file(captions[0], samples.MAX_TEXT_BYTES), ""
        if isinstance(content, bytes):
            try:
                caption = content.decode("utf-8-sig").strip()
            except UnicodeDecodeError:
                content = PairFlaw.CAPTION_NOT_UTF8
        for image in images:
            if isinstance(content, PairFlaw):
                yield NoPair(captions[0], content)
            else:
                yield _check_pair(found, image, found.name_of(image), image, caption, None)


def _iterate_rows(found: FoundSource, file: str, has_images: bool = True) -> Iterator[_Row]:
    """The rows of a table or parquet file; without images where they lie in its columns."""
    source, kind = found.source, text_format(file)
    image, caption, url = _find_columns(source, file)
    if kind is None:
        columns = (caption, *((image, *([url] if url else [])) if has_images else ()))
        for number, (texts, *more) in enumerate(read_parquet_rows(file, columns, ROWS_AT_ONCE)):
            held, address = (*more, None, None)[:2]
            captions = texts if isinstance(texts, list) else [texts]
            yield _Row(f"row {number}", held, captions, address)
    else:
        for row in read_text_table(file, kind, source.quoting, source.header):
            text = row.values.get(caption)
            several = parse_list(text, kind) if text else None
            captions = several if several is not None else [text]
            held, address = row.values.get(image), row.values.get(url) if url else None
            yield _Row(f"line {row.line}", held, captions, address, row.flaw)


def column_types(source: AdoptedSource, file: str) -> tuple[list[str], list[str]]:
    """(names of all columns of a table, those of a type that holds images)."""
    if (kind := text_format(file)) is not None:
        return column_names(file, kind, source.quoting, source.header), []
    schema = parquet_schema(file, f"adopt.sources '{source.name}'")
    return schema.names, [field.name for field in schema if finding.is_image_type(field.type)]


def _row_pairs(found: FoundSource, file: str, row: _Row) -> Iterator[FoundPair | NoPair]:
    """The pairs that one row is: one a caption."""
    where, held, flaw = f"{file}, {row.place}", row.image, row.flaw
    captions, url, written = list[str](), row.url, None
    if isinstance(held, list):
        flaw = flaw or (samples.MemberFlaw.SEVERAL_IMAGES if len(held) > 1 else None)
        held = held[0] if held else None
    if isinstance(held, dict):
        held = held.get("bytes") or held.get("path")
    if isinstance(held, bytes) and not _image_extension(held) and len(held) < 4096:
        with suppress(UnicodeDecodeError):  # text columns come as bytes: a path
            held = held.decode()
    if not isinstance(held, bytes | str):
        flaw = flaw or (PairFlaw.NOT_AN_IMAGE if held else PairFlaw.NO_IMAGE)
    try:
        captions = _strip_captions(row.captions)
        url = url.decode() if isinstance(url, bytes) else url
    except UnicodeDecodeError:
        flaw = flaw or PairFlaw.CAPTION_NOT_UTF8
    if flaw or not held:
        yield NoPair(where, flaw or PairFlaw.NO_IMAGE)
        return
    if isinstance(held, str):
        if held.startswith(("http://", "https://")):
            raise InputError(
                f"{where}: '{held[:80]}' is an address, not a file: name the table in "
                "[[merge.sources]] and let [download] fetch its images"
            )
        root, written = found.source.image_root or posixpath.dirname(file), held
        held = held if is_url(held) else posixpath.join(root, held)
        held = held if is_url(held) else table_columns.local_path(held)
        if not _is_below(found.source.within or root, held):
            yield NoPair(where, PairFlaw.OUTSIDE_FOLDER)
            return
    origin = f"{found.name_of(file)}:{row.place.split()[1]}"
    for caption in captions or [""]:
        yield _check_pair(found, where, origin, held, caption, url, written)


def _is_below(folder: str, place: str) -> bool:
    """Tell whether a path or URL lies in a folder by its name. Links are followed: Hugging Face's
    cache consists of them."""
    folder = folder if is_url(folder) else posixpath.abspath(folder)
    return place.startswith(f"{folder.rstrip('/')}/") and ".." not in place.split("/")


def _strip_captions(texts: Sequence[Any]) -> list[str]:
    """Return what of a row's values can be a caption: texts and numbers, not NaN or what is
    built of them."""
    plain = (text.decode() if isinstance(text, bytes) else text for text in texts if text == text)
    said = [str(text).strip() for text in plain if isinstance(text, str | int | float)]
    return [text for text in said if text]


def _find_columns(source: AdoptedSource, file: str) -> tuple[str, str, str]:
    """Names of the columns of image, caption and address, "" where there is none of the last;
    refuse a table that lacks one."""
    names, typed = column_types(source, file)
    where = f"{file}: adopt.sources '{source.name}'"
    known = f"its columns are {', '.join(names) or 'none'}"
    for part, name in (("image", source.image), ("caption", source.caption)):
        if name is not None and name not in names:
            raise InputError(f"{where} has no column '{name}' for its {part}; {known}")
    own = typed if len(typed) == 1 else [table_columns.match_column(typed, "images")]
    image = source.image or own[0] or table_columns.match_column(names, "images")
    caption = source.caption or table_columns.match_column(names, "captions")
    url = table_columns.match_column(names, "urls")
    if url and not image:
        raise InputError(
            f"{where} holds addresses of images ({url}), not images: name it in [[merge.sources]] "
            "and let [download] fetch them"
        )
    if not (image and caption):
        part = "caption" if image else "image"
        raise InputError(f"{where}: which column is its {part}? Set '{part}'; {known}")
    return image, caption, url


def _check_pair(
    found: FoundSource,
    where: str,
    origin: str,
    image: bytes | str,
    caption: str,
    url: str | None,
    written: str | None = None,
) -> FoundPair | NoPair:
    """A pair whose image is there and is one by its first bytes."""
    if not caption:
        return NoPair(where, PairFlaw.NO_CAPTION)
    content = _read_file(image, samples.MAX_IMAGE_BYTES) if isinstance(image, str) else image
    if isinstance(content, PairFlaw):
        return NoPair(where, content)
    if len(content) > samples.MAX_IMAGE_BYTES:
        return NoPair(where, PairFlaw.TOO_LARGE)
    extension = _image_extension(content)
    if not extension:
        return NoPair(where, PairFlaw.NOT_AN_IMAGE)
    known = hashlib.sha256(content).hexdigest() if isinstance(image, bytes) else written or origin
    identity = f"{found.source.name}\n{known}\n{caption}".encode("utf-8", "replace")
    uid = hashlib.md5(identity, usedforsecurity=False).hexdigest()
    record = {"uid": uid, "source": found.source.name, "original_id": origin}
    return FoundPair(content, extension, caption, record | ({"url": url} if url else {}))


def _read_file(location: str, most: int) -> bytes | PairFlaw:
    try:
        with open_binary(location) as file:
            content = bytes(file.read(most + 1))
    except FileNotFoundError:
        return PairFlaw.MISSING_FILE
    except Exception:  # one file, whatever its store or its name says
        return PairFlaw.UNREADABLE_FILE
    return content if len(content) <= most else PairFlaw.TOO_LARGE


def _image_extension(content: bytes) -> str:
    """The extension of the format that an image's first bytes show; empty when none is opened."""
    kind = (identify_format(content) or "").lower()
    return {"tiff": "tif", "jpeg": "jpg"}.get(kind, kind)
