"""SugarCrepe, Winoground and WinoGAViL as they are published, as choice sets.

{"0": {"filename", "caption", "negative_caption"}}      SugarCrepe; a list or a table does as well,
                                                        with several negatives in columns or a list
{"image_0", "image_1", "caption_0", "caption_1"}        Winoground's examples, a line each
candidates, cue, associations                           WinoGAViL; the files are called as its words
"""

import ast
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evaclip_model.errors import InputError
from evaclip_model.reading.urls import read_text
from tasks.evaluate.sets.choice_questions import Question
from tasks.evaluate.sets.convert.label_table import match_column, read_rows
from tasks.evaluate.sets.convert.shard_writer import Source
from tasks.evaluate.sets.convert.source_images import FileFinder, image_source

_FORMS = (
    'expected SugarCrepe\'s {"0": {"filename", "caption", "negative_caption"}}, Winoground\'s '
    'lines {"image_0", "image_1", "caption_0", "caption_1"}, or WinoGAViL\'s candidates, cue and '
    "associations"
)
_MOST_CHARACTERS = 10_000


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
        for path in paths:
            if path not in sources:
                sources[path] = image_source(path, ())
        keys = tuple(sources[path].name for path in paths)
        try:
            questions.append(Question(images=keys, texts=tuple(texts), pairs=tuple(pairs)))
        except ValueError:
            raise InputError(f"{where} has no wrong answer, or no right one: {_FORMS}") from None
    if len({question.form for question in questions}) != 1:
        raise InputError(f"{listing} has no question, or several forms of them: {_FORMS}")
    return list(sources.values()), questions


def _iterate_rows(listing: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    content = None
    if listing.suffix.lower() == ".json" and listing.is_file():
        try:
            content = json.loads(read_text(listing))
        except (ValueError, RecursionError):
            raise InputError(f"{listing} is not JSON: {_FORMS}") from None
    if not isinstance(content, dict):
        yield from read_rows(listing)[1]
        return
    for key, row in content.items():
        if not isinstance(row, dict):
            raise InputError(f"{listing} entry '{key[:40]}' is of another form: {_FORMS}")
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
            raise InputError(f"{where} has associations that are not candidates: {_FORMS}")
        return named, [text], [(place, 0) for place, one in enumerate(named) if one in right]
    image = match_column([name for name, value in row.items() if value], "paths")
    right = _texts(row.get(match_column(row, "caption")))
    wrong = [text for name in row if "negative" in name.casefold() for text in _texts(row[name])]
    if not (image and right and wrong):
        raise InputError(f"{where} is not a question: {_FORMS}")
    return [str(row[image])], [*right, *wrong], [(0, place) for place in range(len(right))]


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    return [text for text in (str(one or "").strip() for one in values) if text]


def _read_list(value: Any, where: str) -> list[str]:
    """A list, or the text of one, as tables hold it."""
    if isinstance(value, str) and len(value) <= _MOST_CHARACTERS:
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            value = None
    if not isinstance(value, list | tuple) or not value:
        raise InputError(f"{where} does not hold a list of words: {_FORMS}")
    return [str(one) for one in value]
