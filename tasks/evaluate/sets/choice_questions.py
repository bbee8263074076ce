"""Questions of a `choice` set: which of a few texts, or of a few images, belong together.

They stand in `questions.jsonl` beside the tars, which hold the images alone:

{"images": ["s0000000"], "texts": ["right", "wrong"], "pairs": [[0, 0]]}         a text for an image
{"images": ["s1", "s2"], "texts": ["of s1", "of s2"], "pairs": [[0, 0], [1, 1]]} two by two
{"images": ["s1", "s2", "s3"], "texts": ["cue"], "pairs": [[1, 0], [2, 0]]}      images for a text

A pair is the number of an image and that of a text. All questions of a set have one form.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from evaclip_model.config import Config, explain_error
from evaclip_model.errors import InputError
from evaclip_model.reading.urls import read_text

QUESTIONS = "questions.jsonl"
Form = Literal["texts", "two by two", "images"]
"""What is chosen from."""


class Question(Config):
    images: tuple[str, ...] = Field(min_length=1)
    """Keys of samples."""
    texts: tuple[str, ...] = Field(min_length=1)
    pairs: tuple[tuple[int, int], ...] = Field(min_length=1)
    """(image, text) by their places here, of those that belong together."""

    @model_validator(mode="after")
    def _has_a_form(self) -> Self:
        for image, text in self.pairs:
            if not (0 <= image < len(self.images) and 0 <= text < len(self.texts)):
                raise ValueError(f"has no image {image} and text {text}, counted from 0")
        assert self.form
        return self

    @property
    def form(self) -> Form:
        images, texts, pairs = len(self.images), len(self.texts), set(self.pairs)
        if images == 1 < texts and len(pairs) < texts:
            return "texts"
        if texts == 1 < images and len(pairs) < images:
            return "images"
        if images == texts == 2 and pairs == {(0, 0), (1, 1)}:
            return "two by two"
        raise ValueError(
            "needs one image and several texts or several images and one text, not all of them "
            "right, or two of each with the pairs [0, 0] and [1, 1]"
        )


def read_questions(folder: Path, keys: Sequence[str]) -> tuple[Question, ...]:
    """The questions of the set in `folder`, whose samples have these keys. Raises InputError: the
    file is missing or of another form, or an image is not in the set."""
    path = folder / QUESTIONS
    try:
        lines = [line for line in read_text(path).split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{path} is missing or not text: expected one question a line") from None
    found, there = [], set(keys)
    for number, line in enumerate(lines, 1):
        try:
            found.append(Question.model_validate_json(line))
        except ValidationError as error:
            raise InputError(f"{path} line {number}: {explain_error(Question, error)}") from None
        if strange := [key for key in found[-1].images if key not in there]:
            raise InputError(f"{path} line {number}: the set has no image '{strange[0]}'")
    forms = sorted({question.form for question in found})
    if len(forms) != 1:
        raise InputError(f"{path} needs questions of one form, not {' and '.join(forms) or 'none'}")
    return tuple(found)
