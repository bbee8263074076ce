"""The answers of every model to every sample, as one file that people look into and compute on.

`answers.parquet` has a row for each question, sets and models one after the other;
`docs/evaluate.md` says what its columns are.
"""

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow
import torch
from pyarrow import json as pyarrow_json, parquet
from torch import Tensor

from evaclip_model.files import replace_file
from evaclip_model.zeroshot.exact_ranks import ROWS, top_k
from tasks.evaluate.metrics.scored import SHOWN, Scored, image_of_caption

WriteAnswers = Callable[[str, Scored, Tensor, Tensor], None]
"""Called with the model's name, its answers, its features of images [N, D], and of what can be
answered [A, D]."""
SCHEMA = pyarrow.schema(
    {
        **{name: pyarrow.string() for name in ("set", "model", "direction", "key", "query")},
        **{"label": pyarrow.list_(pyarrow.int32()), "rank": pyarrow.int32()},
        **{"answers": pyarrow.list_(pyarrow.int32()), "names": pyarrow.list_(pyarrow.string())},
        "scores": pyarrow.list_(pyarrow.float32()),
    }
)
_ROWS_AT_ONCE = 100_000


@contextmanager
def write_answers(path: Path) -> Iterator[WriteAnswers]:
    """Yield what adds a model's answers to a set; the file is there when all are written."""
    with replace_file(path) as beside, parquet.ParquetWriter(beside, SCHEMA) as file:

        def write(model: str, scored: Scored, images: Tensor, answers: Tensor) -> None:
            about = {"set": scored.evalset.name, "model": model}
            rows = chain(_list_answers(scored, images, answers), _list_choices(scored))
            while lines := [_write_line(about | row) for row in islice(rows, _ROWS_AT_ONCE)]:
                file.write_table(_read_lines(b"".join(lines)))

        yield write


def _write_line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _read_lines(lines: bytes) -> pyarrow.Table:
    """The table of JSON lines: a table of Python's values would import pandas, a quarter of a
    second that an evaluation from cached features feels."""
    return pyarrow_json.read_json(
        io.BytesIO(lines),
        read_options=pyarrow_json.ReadOptions(use_threads=False, block_size=len(lines)),
        parse_options=pyarrow_json.ParseOptions(
            explicit_schema=SCHEMA, unexpected_field_behavior="error"
        ),
    )


def _list_choices(scored: Scored) -> Iterator[dict[str, Any]]:
    """A row for each image of a choice set's questions, or for each text where images are chosen;
    the answers are those of the question, the nearest first."""
    if scored.similarities is None:
        return
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
                "direction": "text → image" if chooses else "image → text",
                "key": question.images[own[0]] if chooses else asked[place],
                "query": asked[place] if chooses else None,
                "label": [numbers[one] for one in own],
                "rank": min(order.index(one) for one in own) if own else None,
                "answers": [numbers[one] for one in order],
                "names": [names[one] for one in order],
                "scores": [values[one] for one in order],
            }


def _list_answers(scored: Scored, images: Tensor, answers: Tensor) -> Iterator[dict[str, Any]]:
    """A row for each question of each direction in which a set asks."""
    samples, captions = scored.evalset.samples, scored.evalset.captions
    keys, owner = [one.key for one in samples], image_of_caption(scored.evalset).tolist()
    labels = [[*one.labels] or [one.label] for one in samples]
    if scored.scores is not None:  # an image may show none
        labels = [[*one.labels] for one in samples]
    if captions:
        labels = [[] for _ in samples]
        for caption, image in enumerate(owner):
            labels[image].append(caption)
    found = {
        name: (one.top, one.ranks.tolist()) for name, one in scored.rankings_by_direction().items()
    }
    if scored.scores is not None:
        found["image → class"] = top_k(scored.scores, SHOWN), [None] * len(samples)
    for direction, (top, ranks) in found.items():
        names, asked, gallery = captions or scored.evalset.classnames, images, answers
        about = {"key": keys, "query": [None] * len(keys), "label": labels}
        if direction.startswith("text"):
            names, asked, gallery = keys, answers, images
            about = {"key": [keys[one] for one in owner], "query": captions}
            about["label"] = [[one] for one in owner]
        parts = [
            torch.einsum("qd,qkd->qk", asked[rows].float(), gallery[top[rows]].float())
            for rows in torch.split(torch.arange(len(top)), ROWS)
        ]
        columns = about | {
            "direction": [direction] * len(top),
            "rank": ranks,
            "answers": top.tolist(),
            "names": [[names[answer] for answer in row] for row in top.tolist()],
            "scores": torch.cat(parts).tolist(),
        }
        for row in zip(*columns.values(), strict=True):
            yield dict(zip(columns, row, strict=True))
