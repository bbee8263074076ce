"""Features of folders, tables and webdataset shards as parquet files that other programs read.

    DIR/NAME.parquet          id, caption, image and text (unit vectors, float16 lists of one
                              length), similarity; without the columns that the input has not
    DIR/NAME.unreadable.json  [id, reason] of all that has no row

A part is a tar, or `PART_ROWS` files of a folder or rows of a table, written beside its place. A
finished one says in its metadata which model and input it is of. Features are those of the
pipeline's stage `embed`, bit for bit. Needs pyarrow.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from evaclip_model.errors import InputError
from evaclip_model.files import replace_file, write_atomically
from evaclip_model.model.clip import EvaClip
from evaclip_model.reading.samples import BrokenShard, read_samples
from evaclip_model.zeroshot.encode_chunks import (
    EvaSubject,
    embed_images,
    embed_texts,
    exact_arithmetic,
)
from evaclip_model.zeroshot.image_files import image_files, load_image

PART_ROWS = 4096
AT_ONCE = 256
"""Rows whose images are decoded and in memory at the same time."""
COLUMNS: Mapping[str, Sequence[str]] = {
    "id": ("id", "uid", "key"),
    "image": ("image", "image_path", "path", "filepath", "file_name", "filename"),
    "caption": ("caption", "text"),
}
"""What of a table's row is read from which column, the first that there is."""
TABLES = (".csv", ".tsv", ".parquet", ".txt")
_MADE_OF, _UNREADABLE = b"evaclip", ".unreadable.json"


class Row(NamedTuple):
    """One thing to encode: an image, a caption, or both."""

    id: str
    image: Any = None
    """Path or bytes."""
    caption: str | None = None
    flaw: str | None = None
    """Why it cannot be encoded."""


def embed_inputs(
    model: EvaClip,
    sources: Iterable[Path],
    out: Path,
    *,
    share: tuple[int, int] = (0, 1),
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[int, list[tuple[str, str]]]:
    """Encode what `sources` hold into a folder: (rows there, (id, reason) of what has none).

    What was finished before is only counted. Of a `share` (k, n) every n-th part from the k-th on
    is encoded, so that processes can share a folder. `progress` gets the rows done. InputError: an
    input cannot be read, two have one name, or features are not finite."""
    out.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(f"{model.config!r}{model.logit_scale.dtype}".encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    subject, names, done = EvaSubject(model), set[str](), 0
    unreadable: list[tuple[str, str]] = []
    with exact_arithmetic(model.logit_scale.device.type):
        parts = (part for source in sources for part in _list_parts(source))
        for number, (name, mark, rows) in enumerate(parts):
            if name in names:
                raise InputError(f"two inputs are called '{name}': rename one of them")
            names.add(name)
            if number % share[1] != share[0]:
                continue

            def say(more: int, before: int = done + len(unreadable)) -> None:
                progress(before + more)

            made_of = json.dumps([digest.hexdigest(), str(model.logit_scale.device), mark])
            file = out / f"{name}.parquet"
            if not _is_finished(file, made_of):
                _write_part(subject, rows, file, made_of, say)
            done += pq.read_metadata(file).num_rows
            unreadable += json.loads(file.with_suffix(_UNREADABLE).read_bytes())
            progress(done + len(unreadable))
    return done, unreadable


def feature_columns(image: Tensor | None, text: Tensor | None) -> dict[str, Any]:
    """Unit features [N, D] as columns `image` and `text`, float16 lists; of both, `similarity`."""
    columns: dict[str, Any] = {}
    for name, features in (("image", image), ("text", text)):
        if features is not None:
            flat = pa.array(features.numpy().astype(np.float16).reshape(-1))
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, features.shape[1])
    if image is not None and text is not None:
        columns["similarity"] = pa.array((image * text).sum(dim=1).numpy(), pa.float32())
    return columns


def _list_parts(source: Path) -> Iterator[tuple[str, list[Any], Iterable[Row]]]:
    """(name, what changes when its content does, rows) of every part."""
    if source.suffix == ".tar" and source.is_file():
        yield source.stem, [_mark(source)], _read_tar(source)
    elif source.is_dir() and (tars := sorted(source.glob("*.tar"))):
        yield from (part for tar in tars for part in _list_parts(tar))
    else:
        is_table = source.suffix in TABLES and source.is_file()
        root = source if source.is_dir() else source.parent
        files = [] if is_table else image_files(source)
        of_files = (Row(file.relative_to(root).as_posix(), file) for file in files)
        rows = iter(_read_table(source) if is_table else of_files)
        for number, taken in enumerate(iter(lambda: [*islice(rows, PART_ROWS)], [])):
            marks = [_mark(source), number] if is_table else [_mark(row.image) for row in taken]
            yield f"{source.stem}-{number:06d}", marks, taken


def _mark(file: Path) -> list[Any]:
    if not file.exists():  # a link that leads nowhere
        return [file.name]
    return [file.name, file.stat().st_size, file.stat().st_mtime_ns]


def _read_tar(tar: Path) -> Iterator[Row]:
    try:
        for one in read_samples(tar):
            yield Row(one.key, one.image, one.caption, one.flaw)
    except BrokenShard as error:
        raise InputError(f"{error}: fetch or write it again") from None


def _read_table(table: Path) -> Iterator[Row]:
    """Rows of a table, whose paths of images begin at its folder; or lines, which are captions."""
    try:
        for number, row in enumerate(_read_values(table)):
            places = {what: next((n for n in COLUMNS[what] if n in row), "") for what in COLUMNS}
            if not places["image"] and not places["caption"]:
                known = ", ".join([*COLUMNS["image"], *COLUMNS["caption"]])
                raise InputError(f"{table} has columns {', '.join(row)}: expected one of {known}")
            named, image, caption = (row.get(places[what]) for what in COLUMNS)
            if isinstance(image, Mapping):  # as Hugging Face has them
                image = image.get("bytes") or image.get("path")
            flaw = "no_image" if places["image"] and not image else None
            flaw = "no_caption" if places["caption"] and not caption else flaw
            if isinstance(image, str):  # the table may be a stranger's
                image = (table.parent / image).resolve()
                flaw = flaw if image.is_relative_to(table.parent.resolve()) else "outside_folder"
            yield Row(str(number if named is None else named), image, caption, flaw)
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise InputError(f"{table} cannot be read as a table ({error})") from None


def _read_values(table: Path) -> Iterator[Mapping[str, Any]]:
    if table.suffix == ".parquet":
        file, known = pq.ParquetFile(table), {name for names in COLUMNS.values() for name in names}
        wanted = [name for name in file.schema_arrow.names if name in known]
        for batch in file.iter_batches(AT_ONCE, columns=wanted or None):
            yield from batch.to_pylist()
        return
    with table.open(encoding="utf-8-sig", newline="") as text:
        if table.suffix == ".txt":
            yield from ({"caption": line.rstrip("\r\n")} for line in text)
        else:
            yield from csv.DictReader(text, delimiter="\t" if table.suffix == ".tsv" else ",")


def _is_finished(file: Path, made_of: str) -> bool:
    try:
        return (pq.read_metadata(file).metadata or {}).get(_MADE_OF) == made_of.encode()
    except (OSError, pa.ArrowException):
        return False


def _write_part(
    subject: EvaSubject,
    rows: Iterable[Row],
    file: Path,
    made_of: str,
    progress: Callable[[int], None],
) -> None:
    def load(row: Row) -> Any:
        """A row's pixels, None if it is a text alone; or in words why it has none."""
        return (
            row.flaw if row.flaw or row.image is None else load_image(row.image, subject.transform)
        )

    left, rows, done = list[tuple[str, str]](), iter(rows), 0
    schema, writer = pa.schema({"id": pa.string()}, {_MADE_OF: made_of}), None
    with ThreadPoolExecutor() as pool, replace_file(file) as beside:
        for taken in iter(lambda: [*islice(rows, AT_ONCE)], []):
            found = list(zip(taken, pool.map(load, taken), strict=True))
            left += [(row.id, got) for row, got in found if isinstance(got, str)]
            if good := [(row, got) for row, got in found if not isinstance(got, str)]:
                table = _encode(subject, [row for row, _ in good], [got for _, got in good])
                table = table.replace_schema_metadata(schema.metadata)
                writer = writer or pq.ParquetWriter(beside, table.schema, compression="zstd")
                writer.write_table(table)
            done += len(taken)
            progress(done)
        (writer or pq.ParquetWriter(beside, schema)).close()
        write_atomically(file.with_suffix(_UNREADABLE), json.dumps(left) + "\n")


def _encode(subject: EvaSubject, rows: Sequence[Row], pixels: Sequence[Any]) -> pa.Table:
    """The features of rows that all have an image, or none, and so of captions."""
    columns: dict[str, Any] = {"id": pa.array([row.id for row in rows], pa.string())}
    image = embed_images(subject, iter(pixels)) if pixels[0] is not None else None
    text = None
    if rows[0].caption is not None:
        columns["caption"] = captions = [row.caption or "" for row in rows]
        text = embed_texts(subject, captions)
    return pa.table(columns | feature_columns(image, text))
