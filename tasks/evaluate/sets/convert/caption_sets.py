"""Images with captions, in the forms in which people have them, as a retrieval or a choice set.

All captions of an image are kept: COCO's 5,000 test images have 25,010. Of questions there are

{"0": {"filename", "caption", "negative_caption"}}      SugarCrepe; a list or a table does as well,
                                                        with several negatives in columns or a list
{"image_0", "image_1", "caption_0", "caption_1"}        Winoground's examples, a line each
candidates, cue, associations                           WinoGAViL; the files are called as its words
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from evaclip_model.errors import InputError, shorten_error
from evaclip_model.files import refuse_special
from evaclip_model.reading.table_columns import match_column
from evaclip_model.reading.urls import read_text
from tasks.evaluate.sets.choice_questions import Question
from tasks.evaluate.sets.convert.label_table import choose_split, path_cell, read_rows
from tasks.evaluate.sets.convert.shard_writer import Source
from tasks.evaluate.sets.convert.source_images import FileFinder, image_source, walk_files
from tasks.tables.text_tables import parse_as_written, parse_list

_FORMS = (
    'expected Karpathy\'s {"images": [{"filename", "split", "sentences": [{"raw"}]}]}, COCO\'s '
    '{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}, a list of '
    '{"image", "caption"}, Flickr\'s lines FILE#N<tab>CAPTION, a table of images and captions, '
    "or a folder of .txt"
)
_TOKEN_LINE = re.compile(r"(.+?)#\d+\t(.*)")

Captions = dict[str, list[str]]
"""File -> its captions."""


def captioned_sources(listing: Path, images: Path, split: str = "test") -> list[Source]:
    """The images of a listing, in its order, each with all its captions. Raises InputError: the
    file is missing or of another form, has nothing in this split, names a file outside `images`, or
    has an image without a caption."""
    refuse_special(listing)
    if not (listing.is_file() or listing.is_dir()):
        raise InputError(f"{listing} is missing: {_FORMS}")
    try:
        captions = _read_listing(listing, split)
    except InputError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{listing} cannot be read ({shorten_error(error)}): {_FORMS}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{listing} is not of a known form: {_FORMS}") from None
    if not captions:
        raise InputError(f"{listing} has no image, or is not of a known form: {_FORMS}")
    sources, finder = [], FileFinder(images)
    for name, texts in captions.items():
        kept = tuple(text for text in map(str.strip, texts) if text)
        if not kept:
            raise InputError(f"{listing}: {name} has no caption")
        sources.append(image_source(finder.find_file(name, str(listing)), kept))
    return sources


def _read_listing(listing: Path, split: str) -> Captions:
    if listing.is_dir():
        # A text file an image, called as it is (Urban1k): the whole file is its caption.
        texts = sorted(one for one in walk_files(listing) if one.suffix.lower() == ".txt")
        read = partial(Path.read_text, encoding="utf-8-sig", errors="replace")
        return _group_captions((one.stem, [read(one)]) for one in texts)
    if listing.suffix.lower() == ".json":
        content = json.loads(read_text(listing))
        if isinstance(content, dict):
            return _read_coco(content, listing, split)
    elif listing.suffix.lower() != ".parquet":
        lines = read_text(listing).split("\n")
        if _TOKEN_LINE.fullmatch(lines[0]):
            matches = [_TOKEN_LINE.fullmatch(line) for line in lines if line.strip()]
            if None in matches:
                number = matches.index(None) + 1
                raise InputError(f"{listing} row {number} is not FILE#NUMBER<tab>CAPTION")
            return _group_captions((match[1], [match[2]]) for match in matches if match)
    columns, rows = read_rows(listing)
    if not rows:
        return {}
    if "split" in columns:
        rows = choose_split(rows, split, listing)
    image, caption = (match_column(columns, one) for one in ("paths", "captions"))
    if not image or not caption:
        raise InputError(
            f"{listing} has the columns {', '.join(columns)}: expected one of images (image, path, "
            "filename ...) and one of captions (caption, comment, text ...)"
        )
    return _group_captions(
        (
            re.sub(r"#\d+$", "", path_cell(row, image, where)),
            row[caption] if isinstance(row[caption], list) else [str(row[caption] or "")],
        )
        for where, row in rows
    )


def _read_coco(content: Any, listing: Path, split: str) -> Captions:
    """Karpathy's form; or COCO's own: images and captions in two lists, joined by an image's id."""
    if "annotations" in content:
        names = {entry["id"]: entry["file_name"] for entry in content["images"]}
        found: dict[int, list[str]] = {number: [] for number in names}
        for entry in sorted(content["annotations"], key=lambda entry: entry["id"]):
            if entry["image_id"] not in found or not isinstance(entry.get("caption"), str):
                which = f"annotation {entry['id']} of image {entry['image_id']!r}"
                raise InputError(f"{listing}: {which} has no caption, or no such image: mend it")
            found[entry["image_id"]].append(entry["caption"])
        return _group_captions((names[one], texts) for one, texts in found.items() if texts)
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


def _group_captions(pairs: Iterable[tuple[str, Sequence[str]]]) -> Captions:
    found: Captions = {}
    for name, texts in pairs:
        if not all(isinstance(one, str) for one in (name, *texts)):
            raise TypeError(name)
        found.setdefault(name, []).extend(texts)
    return found


_CHOICE_FORMS = (
    'expected SugarCrepe\'s {"0": {"filename", "caption", "negative_caption"}}, Winoground\'s '
    'lines {"image_0", "image_1", "caption_0", "caption_1"}, or WinoGAViL\'s candidates, cue and '
    "associations"
)


def choice_sources(listing: Path, images: Path) -> tuple[list[Source], list[Question]]:
    """The images that a list's questions are about, each once, and the questions, which call an
    image by the name of its source. Raises InputError: the list is missing or of another form,
    names a file outside `images`, or a question has no right or no wrong answer."""
    finder = FileFinder(images)
    sources: dict[Path, Source] = {}
    questions = []
    for where, row in _iterate_rows(listing):
        named, texts, pairs = _read_question(row, where)
        paths = [finder.find_file(name, where) for name in named]
        sources |= {path: image_source(path, ()) for path in paths if path not in sources}
        keys = tuple(sources[path].name for path in paths)
        try:
            questions.append(Question(images=keys, texts=tuple(texts), pairs=tuple(pairs)))
        except ValueError:
            raise InputError(
                f"{where} has no wrong answer, or no right one: {_CHOICE_FORMS}"
            ) from None
    if len({question.form for question in questions}) != 1:
        raise InputError(f"{listing} has no question, or several forms of them: {_CHOICE_FORMS}")
    return list(sources.values()), questions


def _iterate_rows(listing: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    content = None
    if listing.suffix.lower() == ".json" and listing.is_file():
        try:
            content = parse_as_written(read_text(listing))
        except (ValueError, RecursionError):
            raise InputError(f"{listing} is not JSON: {_CHOICE_FORMS}") from None
    if not isinstance(content, dict):
        yield from read_rows(listing)[1]
        return
    for key, row in content.items():
        if not isinstance(row, dict):
            raise InputError(f"{listing} entry '{key[:40]}' is of another form: {_CHOICE_FORMS}")
        yield f"{listing} entry '{key[:40]}'", row


def _read_question(
    row: Mapping[str, Any], where: str
) -> tuple[list[str], list[str], list[tuple[int, int]]]:
    """Names of images, texts, and the pairs that belong together."""
    if {"image_0", "image_1", "caption_0", "caption_1"} <= row.keys():
        named, texts = ([str(row[f"{one}_{n}"]) for n in (0, 1)] for one in ("image", "caption"))
        return named, texts, [(0, 0), (1, 1)]
    if {"candidates", "cue", "associations"} <= row.keys():
        named, right = (_read_list(row[one], where) for one in ("candidates", "associations"))
        cue = str(row["cue"]).lower()
        # CLIP's prompt in the paper's and in DataComp's evaluation.
        text = f"{'An' if cue[:1] in 'aeiou' else 'A'} {cue}"
        if not set(right) <= set(named):
            raise InputError(f"{where} has associations that are not candidates: {_CHOICE_FORMS}")
        return named, [text], [(place, 0) for place, one in enumerate(named) if one in right]
    image = match_column([name for name, value in row.items() if value], "paths")
    right = _texts(row.get(match_column(row, "caption")))
    wrong = [text for name in row if "negative" in name.casefold() for text in _texts(row[name])]
    if not (image and right and wrong):
        raise InputError(f"{where} is not a question: {_CHOICE_FORMS}")
    return [str(row[image])], [*right, *wrong], [(0, place) for place in range(len(right))]


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    return [text for text in (str(one or "").strip() for one in values) if text]


def _read_list(value: Any, where: str) -> list[str]:
    """A list, or the text of one, as tables hold it."""
    if isinstance(value, str):
        value = parse_list(value, "csv")
    if not isinstance(value, list | tuple) or not value:
        raise InputError(f"{where} does not hold a list of words: {_CHOICE_FORMS}")
    return [str(one) for one in value]
