"""Images with captions, in the forms in which people have them, as a retrieval set.

All captions of an image are kept: COCO's 5,000 test images have 25,010.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaclip_model.errors import InputError
from tasks.evaluate.sets.convert.label_table import (
    PATH_COLUMNS,
    choose_split,
    plain_column,
    read_rows,
)
from tasks.evaluate.sets.convert.shard_writer import Source
from tasks.evaluate.sets.convert.source_images import (
    FileFinder,
    image_source,
    path_inside,
    walk_files,
)

_FORMS = (
    'expected Karpathy\'s {"images": [{"filename", "split", "sentences": [{"raw"}]}]}, COCO\'s '
    '{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}, a list of '
    '{"image", "caption"}, Flickr\'s lines FILE#N<tab>CAPTION, a table of images and captions, '
    "or a folder of .txt"
)
_TOKEN_LINE = re.compile(r"(.+?)#\d+\t(.*)")
_CAPTION_COLUMNS = (
    "caption",
    "captions",
    "comment",
    "text",
    "sentence",
    "sentences",
    "raw",
    "title",
    "description",
)

Captions = dict[str, list[str]]
"""File -> its captions."""


def captioned_sources(listing: Path, images: Path, split: str = "test") -> list[Source]:
    """The images of a listing, in its order, each with all its captions. Raises InputError: the
    file is missing or of another form, has nothing in this split, names a file outside `images`, or
    has an image without a caption."""
    if listing.is_dir():
        return _read_folder(listing, images)
    if not listing.is_file():
        raise InputError(f"{listing} is missing: {_FORMS}")
    if listing.suffix.lower() == ".json":
        captions = _read_json(listing, split)
    else:
        captions = _read_text(listing, split)
    if not captions:
        raise InputError(f"{listing} has no image, or is not of a known form: {_FORMS}")
    sources = []
    for name, texts in captions.items():
        kept = tuple(text for text in map(str.strip, texts) if text)
        if not kept:
            raise InputError(f"{listing}: {name} has no caption")
        sources.append(image_source(path_inside(images, name, str(listing)), kept))
    return sources


def _read_json(listing: Path, split: str) -> Captions:
    try:
        content = json.loads(listing.read_text(encoding="utf-8-sig"))
        if isinstance(content, list):
            image, caption = _find_columns(tuple(content[0]), listing) if content else ("", "")
            return _group_captions(
                (entry[image], _caption_texts(entry[caption])) for entry in content
            )
        if "annotations" in content:
            return _read_official(content)
        chosen = [entry for entry in content["images"] if entry["split"] == split]
        if content["images"] and not chosen:
            there = ", ".join(sorted({str(entry["split"]) for entry in content["images"]}))
            raise InputError(f"{listing} has no image in the split '{split}'; there are: {there}")
        return _group_captions(
            (
                str(Path(entry.get("filepath", "")) / entry["filename"]),
                [sentence["raw"] for sentence in entry["sentences"]],
            )
            for entry in chosen
        )
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{listing} cannot be read ({error.strerror}): {_FORMS}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{listing} is not of a known form: {_FORMS}") from None


def _read_official(content: Mapping[str, Any]) -> Captions:
    """COCO's own form: images and captions in two lists, joined by the image's id."""
    names = {entry["id"]: entry["file_name"] for entry in content["images"]}
    found: Captions = {}
    for entry in sorted(content["annotations"], key=lambda entry: entry["id"]):
        found.setdefault(names[entry["image_id"]], []).append(entry["caption"])
    # In the order of images, and without those that have no caption.
    return _group_captions((name, found[name]) for name in names.values() if name in found)


def _read_folder(texts: Path, images: Path) -> list[Source]:
    """A text file an image, called as it is (Urban1k): the whole file is its caption."""
    finder = FileFinder(images)
    sources = []
    for path in sorted(one for one in walk_files(texts) if one.suffix.lower() == ".txt"):
        caption = path.read_text(encoding="utf-8-sig", errors="replace").strip()
        if not caption:
            raise InputError(f"{path} has no caption")
        sources.append(image_source(finder.find_file(path.stem, str(path)), (caption,)))
    if not sources:
        raise InputError(f"{texts} has no .txt file: {_FORMS}")
    return sources


def _read_text(listing: Path, split: str) -> Captions:
    try:
        lines = listing.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        lines = []
    if lines and _TOKEN_LINE.fullmatch(lines[0].rstrip("\r")):
        matches = [_TOKEN_LINE.fullmatch(line.rstrip("\r")) for line in lines if line.strip()]
        broken = next((number for number, match in enumerate(matches, 1) if not match), None)
        if broken:
            raise InputError(f"{listing} row {broken} is not FILE#NUMBER<tab>CAPTION")
        return _group_captions((match[1], [match[2]]) for match in matches if match)
    columns, rows = read_rows(listing)
    if "split" in columns:
        rows = choose_split(rows, split, listing)
    image, caption = _find_columns(columns, listing)
    return _group_captions(
        (re.sub(r"#\d+$", "", str(row[image])), _caption_texts(row[caption])) for _, row in rows
    )


def _find_columns(columns: Sequence[str], listing: Path) -> tuple[str, str]:
    plain = {plain_column(column): column for column in reversed(columns)}
    image = next((plain[name] for name in PATH_COLUMNS if name in plain), None)
    caption = next((plain[name] for name in _CAPTION_COLUMNS if name in plain), None)
    if image is None or caption is None:
        raise InputError(
            f"{listing} has the columns {', '.join(columns)}: expected one of images (image, path, "
            "filename ...) and one of captions (caption, comment, text ...)"
        )
    return image, caption


def _caption_texts(value: Any) -> Sequence[str]:
    if isinstance(value, list | tuple):
        return [str(one) for one in value]
    return [] if value is None else [str(value)]


def _group_captions(pairs: Iterator[tuple[str, Sequence[str]]]) -> Captions:
    found: Captions = {}
    for name, texts in pairs:
        if not all(isinstance(one, str) for one in (name, *texts)):
            raise TypeError(name)
        found.setdefault(name, []).extend(texts)
    return found
