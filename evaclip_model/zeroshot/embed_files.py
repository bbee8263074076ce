"""Features of folders, tables and webdataset shards as parquet files that other programs read.

    DIR/NAME.parquet          id, caption, image and text (unit vectors, float16 lists of one
                              length), similarity; null where a row has no image or no caption
    DIR/NAME.unreadable.json  [id, reason] of all that has no row

A part is a tar, or `PART_ROWS` files of a folder or rows of a table, written beside its place. A
finished one says in its metadata which model and input it is of. Features are those of the stage
`embed` of the pipeline, bit for bit. Needs pyarrow.
"""

import csv
import hashlib
import json
import operator
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from glob import escape
from itertools import chain, dropwhile, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from evaclip_model.errors import InputError, shorten_error
from evaclip_model.files import replace_file, write_atomically
from evaclip_model.model.clip import EvaClip
from evaclip_model.reading.samples import BrokenShard, MemberFlaw, read_samples
from evaclip_model.reading.table_columns import local_path, match_column, tell_delimiter
from evaclip_model.zeroshot import encode_chunks
from evaclip_model.zeroshot.encode_chunks import IMAGE_CHUNK, EvaSubject

PART_ROWS = 4096
AT_ONCE = 16 * IMAGE_CHUNK
"""Rows in memory at the same time; of their images two chunks. A part none of whose first so many
rows can be encoded ends the work."""
PARTS = ("ids", "images", "captions")
"""Of a table's row, each in a column that is known by its name."""
TABLES = (".csv", ".tsv", ".jsonl", ".parquet", ".txt")
_MADE_OF, _UNREADABLE = b"evaclip", ".unreadable.json"
Flaws = list[tuple[str, str]]


class Row(NamedTuple):
    """One thing to encode: an image, a caption, or both."""

    id: str
    image: Any = None  # path, a file's content, or in words why it cannot be encoded
    caption: str | None = None
    weight: int = 1  # of its part's size


class Slice(NamedTuple):
    """Rows whose features are one file."""

    name: str
    mark: list[Any]  # other where the content is
    size: int  # in rows, of a tar in bytes
    rows: Iterator[Row]  # behind those of the parts before


def embed_inputs(
    model: EvaClip,
    sources: Iterable[Path],
    out: Path,
    *,
    share: tuple[int, int] = (0, 1),
    progress: Callable[[int, float], None] = lambda made, fraction: None,
) -> tuple[int, Iterator[tuple[str, str]]]:
    """Encode what `sources` hold into a folder, but for parts that are finished; returns how many
    rows there are, and (id, reason) of what has none.

    Of a `share` (k, n) every n-th part from the k-th on is encoded, so that processes can share a
    folder. `progress` gets the rows that this call has been through, and the fraction of all work
    that is done. InputError: an input cannot be read, two have one name, the folder holds other
    features or cannot be written, features are not finite, or none of the first rows of a part can
    be encoded."""
    parts = [part for source in sources for part in _list_parts(source)]
    files = {part.name: out / f"{part.name}.parquet" for part in parts}
    if twice := Counter(part.name for part in parts) - Counter([*files]):
        raise InputError(f"two inputs are called '{min(twice)}': rename one of them")
    device, cores = model.logit_scale.device.type, len(os.sched_getaffinity(0))
    about, made = hashlib.sha256(f"{model.config!r} {model.logit_scale.dtype} {device}".encode()), 0
    for tensor in model.state_dict().values():
        about.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if others := sorted({*out.glob("*.parquet")} - {*files.values()}):
            raise InputError(f"{others[0]} is of none of these inputs: name its own, or remove it")
        mine, todo = [files[part.name] for part in parts[share[0] :: share[1]]], []
        for part in parts[share[0] :: share[1]]:
            mark = json.dumps([about.hexdigest(), *part.mark])
            made_of = {_MADE_OF: hashlib.sha256(mark.encode()).hexdigest().encode()}
            file = files[part.name]
            both = file.exists() and file.with_suffix(_UNREADABLE).exists()
            if not both or pq.read_schema(file).metadata != made_of:
                todo.append((part, file, made_of))
        with encode_chunks.exact_arithmetic(device), ThreadPoolExecutor(cores, "decode") as pool:
            for at, (part, file, made_of) in enumerate(todo):
                for rows, passed in _write_part(EvaSubject(model), pool, part, file, made_of):
                    made += rows
                    progress(made, (at + passed / part.size) / len(todo))
        there = sum(pq.read_metadata(file).num_rows for file in mine)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{out} cannot be written ({shorten_error(error)})") from None
    said = (json.loads(file.with_suffix(_UNREADABLE).read_bytes()) for file in mine)
    return there, ((name, why) for flaws in said for name, why in flaws)


def feature_columns(image: Tensor, text: Tensor) -> dict[str, pa.Array]:
    """Unit features [N, D] as columns `image` and `text`, float16 lists, and their `similarity`;
    null where they are not numbers."""
    columns = {}
    for name, features in (("image", image), ("text", text)):
        flat = pa.array(features.numpy().astype(np.float16).reshape(-1))
        none = pa.array(features[:, 0].isnan().numpy())
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, features.shape[1], mask=none)
    similarity = (image * text).sum(dim=1).numpy()
    return columns | {"similarity": pa.array(similarity, pa.float32(), from_pandas=True)}


def _list_parts(source: Path) -> Iterator[Slice]:
    is_file, kind = source.is_file(), source.suffix.lower()
    if is_file and kind == ".tar":
        yield Slice(source.stem, _mark(source), max(1, source.stat().st_size), _read_tar(source))
    elif source.is_dir() and (tars := sorted(source.glob("*.[tT][aA][rR]"))):
        yield from (part for tar in tars for part in _list_parts(tar))
    elif is_file and kind in TABLES:
        rows = _read_table(source)
        if next(rows, None) is None:
            raise InputError(f"{source} is empty: expected rows with an image, a caption or both")
        has_count = kind == ".parquet"
        count = pq.read_metadata(source).num_rows if has_count else 1 + sum(1 for _ in rows)
        yield from _cut_rows(source.stem, count, _read_table(source), [source])
    else:
        files, root = encode_chunks.image_files(source), source.parent if is_file else source
        rows = (Row(file.relative_to(root).as_posix(), file) for file in files)
        name = source.stem if is_file else os.path.basename(os.path.abspath(source))
        yield from _cut_rows(name, len(files), rows, files)


def _cut_rows(name: str, count: int, rows: Iterator[Row], files: Sequence[Path]) -> Iterator[Slice]:
    """Parts of rows, each from its own file or all from one."""
    numbered = enumerate(rows)
    for start in range(0, count, PART_ROWS):
        behind = dropwhile(partial(operator.gt, (start,)), numbered)  # parts may be passed over
        some = files[start : start + PART_ROWS] if len(files) == count else files
        size = min(PART_ROWS, count - start)
        mark = [start, *map(_mark, some)]
        mine = (row for _, row in islice(behind, size))
        yield Slice(f"{name}-{start // PART_ROWS:06d}", mark, size, mine)


def _mark(file: Path) -> list[Any]:
    found = file.stat() if file.exists() else file.lstat()  # a link may lead nowhere
    return [file.name, found.st_size, found.st_mtime_ns]


def _read_tar(tar: Path) -> Iterator[Row]:
    """Samples by their record's uid, else by their key; of a torn tar those before the tear."""
    try:
        for one in read_samples(tar):
            image = one.image if one.flaw in (None, MemberFlaw.NO_CAPTION) else str(one.flaw)
            name = str(one.record.get("uid", one.key))
            yield Row(name, image, one.caption or None, len(one.image))
    except BrokenShard as error:
        yield Row(tar.name, f"not a whole tar: {error.__cause__}")


def _read_table(table: Path) -> Iterator[Row]:
    """Rows of a table, whose paths of images begin at its folder; or lines, which are captions."""
    folder, number = Path(os.path.abspath(table.parent)), 0
    try:
        for number, row in enumerate(_read_values(table)):
            places = [match_column(filter(None, row), part) for part in PARTS]
            if not any(places[1:]):
                has = ", ".join(map(str, row))
                raise InputError(f"{table} has columns {has}: expected one of image, path, text …")
            named, image, caption = map(row.get, places)
            if isinstance(image, Mapping):  # as Hugging Face has them
                image = image.get("bytes") or image.get("path")
            if None in row:  # its commas may part what belongs together
                image = "wrong_number_of_columns"
            elif caption and not isinstance(caption, str):
                image = "caption_not_text"
            elif image and isinstance(image, str):  # the table may be a stranger's
                path = Path(local_path(f"{folder}/{image}" if image[0] != "/" else image))
                image = path if path.is_relative_to(folder) else "outside_folder"
            elif not image or not isinstance(image, bytes):
                image = "no_image" if places[1] else None if caption else "no_caption"
            yield Row(str(number if named is None else named), image, caption or None)
    except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException) as error:
        why = f"behind row {number}: {shorten_error(error)}"
        raise InputError(f"{table} cannot be read as a table ({why})") from None


def _read_values(table: Path) -> Iterator[Mapping[str, Any]]:
    kind = table.suffix.lower()
    if kind == ".parquet":
        file = pq.ParquetFile(table, buffer_size=1 << 20)  # not a group of rows at once
        wanted = [name for part in PARTS if (name := match_column(file.schema_arrow.names, part))]
        for group in range(file.num_row_groups):  # each iteration holds all that it has read
            for batch in file.iter_batches(IMAGE_CHUNK, [group], wanted or None):
                yield from batch.to_pylist()
        return
    with table.open(encoding="utf-8-sig", newline="" if kind in (".csv", ".tsv") else "\n") as text:
        if kind == ".jsonl":
            for line in filter(str.strip, text):
                if not isinstance(row := json.loads(line), dict):
                    raise ValueError("expected an object a line")
                yield row
        elif kind == ".txt":
            yield from ({"caption": line.rstrip("\r\n")} for line in text)
        else:
            delimiter = "\t" if kind == ".tsv" else tell_delimiter(text.readline())
            text.seek(0)
            yield from csv.DictReader(text, delimiter=delimiter)


def _write_part(
    subject: EvaSubject, pool: Executor, part: Slice, file: Path, made_of: dict[bytes, bytes]
) -> Iterator[tuple[int, int]]:
    """Make a part's files; yields the rows of each batch, and how much of the part is done."""
    for torn in file.parent.glob(f".{escape(file.name)}.*"):  # of a process that was killed
        torn.unlink()
    flaws, passed = Flaws(), 0
    vector = pa.list_(pa.float16())  # of one length, which may not be null when read back
    kinds = {"id": pa.string(), "caption": pa.string(), "image": vector, "text": vector}
    schema = pa.schema(kinds | {"similarity": pa.float32()}, made_of)
    with replace_file(file) as beside:
        with pq.ParquetWriter(beside, schema, compression="zstd") as writer:
            for first in part.rows:
                rows, before = chain([first], islice(part.rows, AT_ONCE - 1)), len(flaws)
                good, columns = _encode(subject, pool, rows, flaws)
                writer.write_table(pa.table(columns, schema=schema))
                passed += sum(row.weight for row in good)
                if not passed and len(flaws) >= AT_ONCE:
                    why = f"none of {len(flaws):,} rows can be encoded ({': '.join(flaws[0])})"
                    raise InputError(f"{part.name}: {why}")
                yield len(good) + len(flaws) - before, passed
        write_atomically(file.with_suffix(_UNREADABLE), json.dumps(flaws) + "\n")
    yield 0, part.size


def _encode(
    subject: EvaSubject, pool: Executor, rows: Iterator[Row], flaws: Flaws
) -> tuple[list[Row], dict[str, Any]]:
    """The rows that can be encoded, without their images, and their columns; `flaws` gets (id,
    reason) of the others."""
    good = list[Row]()

    def load(row: Row) -> Tensor | str | None:
        return encode_chunks.load_image(row.image, subject.transform)

    def decode() -> Iterator[Tensor]:
        for row, got in encode_chunks.load_ahead(pool, load, rows, IMAGE_CHUNK):
            if isinstance(got, str):
                flaws.append((row.id, got))
            else:
                good.append(row._replace(image=None))
                yield from () if got is None else [got]

    image = encode_chunks.embed_images(subject, decode())
    text = torch.full((len(good), subject.config.embed_dim), torch.nan)
    image = image if len(image) else text.clone()
    captions = [row.caption for row in good]
    if told := {place: caption for place, caption in enumerate(captions) if caption is not None}:
        text[list(told)] = encode_chunks.embed_texts(subject, list(told.values()))
    columns = {"id": [row.id for row in good], "caption": captions}
    return good, columns | feature_columns(image, text)
