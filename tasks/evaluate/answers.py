"""The answers of every model to every sample, as one file that people look into and compute on.

`answers.parquet` has a row for each question, sets and models one after the other;
`docs/evaluate.md` says what its columns are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import torch
from pyarrow import parquet
from torch import Tensor

from evaclip_model.files import replace_file
from evaclip_model.zeroshot.exact_ranks import ROWS, Ranking, top_k
from tasks.evaluate.metrics.scored import SHOWN, Scored, image_of_caption

WriteAnswers = Callable[[str, Scored, Tensor, Tensor], None]
"""Called with the model's name, its answers, its features of images [N, D], and of what can be
answered [A, D]."""
_NAME = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
SCHEMA = pyarrow.schema(
    {
        **{"set": _NAME, "model": _NAME, "direction": _NAME, "key": pyarrow.string()},
        **{"query": pyarrow.string(), "label": pyarrow.list_(pyarrow.int32())},
        **{"rank": pyarrow.int32(), "answers": pyarrow.list_(pyarrow.int32())},
        **{"names": pyarrow.list_(pyarrow.string()), "scores": pyarrow.list_(pyarrow.float32())},
    }
)


@dataclass(frozen=True)
class _Questions:
    """All questions of one direction that a set asks, Q of them, and what was answered."""

    direction: str
    keys: Sequence[str]
    """Of the image asked about, or that the caption asked with belongs to [Q]."""
    queries: Sequence[str | None]
    labels: Sequence[Sequence[int]]
    """Numbers of the right answers [Q]."""
    top: Tensor
    """Numbers of the first answers [Q, k]."""
    ranks: Tensor | None
    """Of the first right answer [Q]."""
    names: Sequence[str]
    """Of the answers [A]."""
    features: Tensor
    """Of what is asked about [Q, D]."""
    gallery: Tensor
    """Of the answers [A, D]."""


@contextmanager
def write_answers(path: Path) -> Iterator[WriteAnswers]:
    """Yield what adds a model's answers to a set; the file is there when all are written."""
    with replace_file(path) as beside, parquet.ParquetWriter(beside, SCHEMA) as file:

        def write(model: str, scored: Scored, images: Tensor, answers: Tensor) -> None:
            for one in _list_questions(scored, images, answers):
                about = {"set": scored.evalset.name, "model": model, "direction": one.direction}
                file.write_table(_make_table(one, about))
            if scored.similarities is not None:
                rows = [*_list_choices(scored, model)]
                file.write_table(pyarrow.Table.from_pylist(rows, schema=SCHEMA))

        yield write


def _list_questions(scored: Scored, images: Tensor, answers: Tensor) -> Iterator[_Questions]:
    evalset = scored.evalset
    keys = [sample.key for sample in evalset.samples]
    nothing = [None] * len(keys)

    def ask_images(
        direction: str,
        labels: Sequence[Sequence[int]],
        given: Ranking | Tensor,
        names: Sequence[str],
    ) -> _Questions:
        top, ranks = (given.top, given.ranks) if isinstance(given, Ranking) else (given, None)
        return _Questions(direction, keys, nothing, labels, top, ranks, names, images, answers)

    if scored.classes is not None:
        labels = [(sample.label,) for sample in evalset.samples]
        yield ask_images("image → class", labels, scored.classes, evalset.classnames)
    if scored.scores is not None:
        several = [sample.labels for sample in evalset.samples]
        first = top_k(scored.scores, SHOWN)
        yield ask_images("image → class", several, first, evalset.classnames)
    captions, owner = evalset.captions, image_of_caption(evalset).tolist()
    if scored.texts is not None:
        own: list[list[int]] = [[] for _ in keys]
        for caption, image in enumerate(owner):
            own[image].append(caption)
        yield ask_images("image → text", own, scored.texts, captions)
    if scored.images is not None:
        yield _Questions(
            "text → image",
            keys=[keys[one] for one in owner],
            queries=captions,
            labels=[(one,) for one in owner],
            top=scored.images.top,
            ranks=scored.images.ranks,
            names=keys,
            features=answers,
            gallery=images,
        )


def _list_choices(scored: Scored, model: str) -> Iterator[dict[str, Any]]:
    """A row for each image of a choice set's questions, or for each text where images are chosen;
    the answers are those of the question, the nearest first."""
    assert scored.similarities is not None
    number = {sample.key: place for place, sample in enumerate(scored.evalset.samples)}
    first = 0
    for question, cosines in zip(scored.evalset.questions, scored.similarities, strict=True):
        texts = range(first, first := first + len(question.texts))
        images = [number[key] for key in question.images]
        chooses = question.form == "images"
        names, numbers = (question.images, images) if chooses else (question.texts, texts)
        asked = question.texts if chooses else question.images
        for place, values in enumerate((cosines.T if chooses else cosines).tolist()):
            own = [pair[not chooses] for pair in question.pairs if pair[chooses] == place]
            order = sorted(range(len(values)), key=lambda one: -values[one])
            yield {
                **{"set": scored.evalset.name, "model": model},
                "direction": "text → image" if chooses else "image → text",
                "key": question.images[own[0]] if chooses else asked[place],
                "query": asked[place] if chooses else None,
                "label": [numbers[one] for one in own],
                "rank": min(order.index(one) for one in own) if own else None,
                "answers": [numbers[one] for one in order],
                "names": [names[one] for one in order],
                "scores": [values[one] for one in order],
            }


def _make_table(one: _Questions, about: dict[str, str]) -> pyarrow.Table:
    size = len(one.keys)
    parts = [
        torch.einsum("qd,qkd->qk", one.features[rows].float(), one.gallery[one.top[rows]].float())
        for rows in torch.split(torch.arange(size), ROWS)
    ]
    top = one.top.tolist()
    columns = {
        **{name: [text] * size for name, text in about.items()},
        "key": one.keys,
        "query": one.queries,
        "label": one.labels,
        "rank": [None] * size if one.ranks is None else one.ranks.tolist(),
        "answers": top,
        "names": [[one.names[answer] for answer in row] for row in top],
        "scores": torch.cat(parts).tolist(),
    }
    return pyarrow.table(columns, schema=SCHEMA)
