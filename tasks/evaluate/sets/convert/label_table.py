"""Tables of images and their labels: CSV, TSV, JSON lines, parquet, plain lists.

path,label        a header with known names, or the columns named by options
a/1.jpg cat       no header: where the first cell of the first row is a file
a/1.jpg;cat|dog   several labels: parted by | ; or , in one cell, a list in JSON and parquet,
                  one row each, or one column of 0 and 1 a class
"""

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaclip_model.errors import InputError, shorten_error
from evaclip_model.files import refuse_special
from evaclip_model.reading.table_columns import match_column, tell_delimiter
from evaclip_model.reading.urls import read_text
from tasks.evaluate.sets.class_order import is_number
from tasks.evaluate.sets.convert.shard_writer import Source
from tasks.evaluate.sets.convert.source_images import FileFinder, image_source
from tasks.tables.text_tables import parse_as_written, parse_list

_JSON_SUFFIXES = (".jsonl", ".jsonlines", ".ndjson", ".json")
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".txt", ".lst", ".list", *_JSON_SUFFIXES)
_FORMS = "expected .csv, .tsv, .jsonl, .parquet, or .txt with a path and a label a line"
_SPLIT = "split"
_WHOLE_FLOAT = re.compile(r"-?\d+\.0")
Row = Mapping[str, Any]
"""Column -> cell."""


@dataclass(frozen=True)
class LabelTable:
    """The one form that images with classes are read into."""

    images: list[Source]
    words: Sequence[str]
    """Every class that occurs, or has a column or a folder, in the source's order."""
    several: bool = False
    """True: an image may have several classes, or none."""
    display_names: Mapping[str, str] = field(default_factory=dict)
    """Names of those classes that have words which are not names."""


def read_label_table(
    listing: Path,
    images: Path,
    columns: tuple[str, str] = ("", ""),
    several: bool = False,
    split: str = "",
) -> LabelTable:
    """The images and labels of a table. Raises InputError: it is missing or of another form, a
    column cannot be told, a row lacks something, an image has two labels where one is expected.

    Args:
        images: folder that its paths lie in.
        columns: of paths and of labels, where these have names of their own.
        several: True where an image may have several classes; a list in a cell says so itself.
        split: rows that are taken of a table with a column "split"; needed where it has several.
    """
    names, every_row = read_rows(listing, images)
    rows = choose_split(every_row, split, listing)
    there = ", ".join(names)
    for asked in filter(None, columns):
        if asked not in names:
            raise InputError(f"{listing} has no column '{asked}'; it has {there}")
    first = columns[0] or match_column(names, "paths")
    second = columns[1] or match_column(names, "labels")
    if not first or not (second or several):
        which = "labels? give --label" if first else "paths of images? give --path"
        raise InputError(f"{listing}: which column has the {which}-column; it has {there}")
    indicators = [] if second else [one for one in names if one not in (first, _SPLIT)]
    finder = FileFinder(images)
    words_of: dict[Path, dict[str, None]] = {}
    rows_of: dict[Path, str] = {}
    for where, row in rows:
        name = path_cell(row, first, where)
        path = finder.find_file(name, where)
        if indicators:
            words = _words_of_indicators(row, indicators, where)
        else:
            several = several or isinstance(row.get(second), list | tuple)
            words = _words_of(row.get(second), second, several, where)
        if path in words_of and not several and list(words_of[path]) != words:
            raise InputError(
                f"{where}: {name} has the label '{words[0]}' here and "
                f"'{next(iter(words_of[path]))}' at {rows_of[path]}: give --multilabel where "
                "images may have several"
            )
        rows_of.setdefault(path, where)
        words_of.setdefault(path, {}).update(dict.fromkeys(words))
    if not words_of:
        raise InputError(f"{listing} has no row")
    every = sorted(indicators or {word for words in words_of.values() for word in words})
    if all(map(is_number, every)):
        every.sort(key=int)  # equal numbers stay in the order of text
    labelled = [image_source(path, tuple(words)) for path, words in words_of.items()]
    return LabelTable(labelled, every, several)


def read_rows(
    listing: Path, images: Path | None = None
) -> tuple[tuple[str, ...], list[tuple[str, Row]]]:
    """Names of the columns of a table, and its rows with where they stand, as "FILE row N". Raises
    InputError: the file is missing, of no known form, or damaged.

    A text table without a header has the columns "path" and "label": where the first cell of its
    first row is a file in `images`, or where it has two cells of which none is a known column.
    """
    import pyarrow.parquet

    suffix, first = listing.suffix.lower(), 1
    refuse_special(listing)
    if not listing.is_file():
        raise InputError(f"{listing} is missing: {_FORMS}")
    if suffix not in TABLE_SUFFIXES:
        raise InputError(f"{listing} is not a known form of table: {_FORMS}")
    rows: Sequence[Row]
    try:
        if suffix == ".parquet":
            table = pyarrow.parquet.read_table(listing)
            columns, rows = tuple(table.column_names), table.to_pylist()
        elif suffix in _JSON_SUFFIXES:
            rows = _json_rows(listing)
            columns = tuple(dict.fromkeys(key for row in rows for key in row))
        else:
            columns, rows, first = _text_rows(listing, images)
    except InputError:
        raise
    except (OSError, ValueError, RecursionError, csv.Error, pyarrow.ArrowException) as error:
        raise InputError(f"{listing} cannot be read ({shorten_error(error)}): {_FORMS}") from None
    return columns, [(f"{listing} row {number}", row) for number, row in enumerate(rows, first)]


def _json_rows(listing: Path) -> list[Row]:
    """The rows of a list of objects, or of JSON Lines, whatever the file is called."""
    text = read_text(listing)
    try:
        rows = parse_as_written(text)
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            raise
        rows = [parse_as_written(line) for line in text.split("\n") if line.strip()]
    if isinstance(rows, dict) and listing.suffix.lower() != ".json":
        rows = [rows]
    if not isinstance(rows, list):
        raise ValueError("it does not hold a list")
    if rows and all(isinstance(row, list) for row in rows):  # ImageNet-ReaL's
        name = "ILSVRC2012_val_{:08d}"
        rows = [{"path": name.format(n), "labels": row} for n, row in enumerate(rows, 1)]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"{listing} row {number} is not an object of columns")
    return rows


def _text_rows(listing: Path, images: Path | None) -> tuple[tuple[str, ...], list[Row], int]:
    """Columns, rows, and the number of the first row in the file."""
    text = read_text(listing)
    cells = _read_cells(listing, text, images)
    rows = [row for row in cells if any(cell.strip() for cell in row)]
    if not rows:
        raise InputError(f"{listing} is empty: {_FORMS}")
    head = [cell.strip() for cell in rows[0]]
    known = match_column(head, "paths") or match_column(head, "labels")
    is_file = images is not None and bool(head[0]) and (images / head[0]).is_file()
    begins = not is_file and (bool(known) or len(head) > 2)
    if not begins and len(head) != 2:
        raise InputError(
            f"{listing} row 1 has {len(head)} cells and is not a header: expected a path and a "
            "label a row, or a header that names the columns"
        )
    columns, first = (tuple(head), 2) if begins else (("path", "label"), 1)
    rest = rows[first - 1 :]
    for number, row in enumerate(rest, first):
        if len(row) != len(columns):
            raise InputError(
                f"{listing} row {number} has {len(row)} cells, expected {len(columns)}"
            )
    parsed = ((parse_list(cell, "csv") or cell for cell in map(str.strip, row)) for row in rest)
    return columns, [dict(zip(columns, row, strict=True)) for row in parsed], first


def _read_cells(listing: Path, text: str, images: Path | None) -> Iterator[list[str]]:
    first = text.lstrip("\n").partition("\n")[0]
    suffix, lines = listing.suffix.lower(), io.StringIO(text, newline="")
    if suffix == ".tsv" or (suffix != ".csv" and "\t" in first):
        return _tab_separated(text)
    if suffix == ".csv":
        return csv.reader(lines, delimiter=tell_delimiter(first))
    if "," in first and " " not in first.strip():
        return csv.reader(lines)
    return (_split_line(line.strip(), images) for line in text.splitlines())


def _split_line(line: str, images: Path | None) -> list[str]:
    """A path and the label behind it, either of which may have spaces: the first words that are a
    file; else all but the last."""
    for space in re.finditer(r"[\s,;|]+", line[:1024]) if images else ():
        name = line[: space.start()]
        if os.path.isfile(f"{images}/{name}"):  # unlike Path's, no error for a long name
            return [name, line[space.end() :]]
    return line.rsplit(None, 1)


def choose_split(rows: list[tuple[str, Row]], split: str, listing: Path) -> list[tuple[str, Row]]:
    """The rows of one split; all where the table has no such column, or one split alone."""
    there = sorted({str(row[_SPLIT]) for _, row in rows if _SPLIT in row})
    if split and split not in there:
        raise InputError(f"{listing} has no split '{split}'; it has {', '.join(there) or 'none'}")
    if not split and len(there) > 1:
        raise InputError(f"{listing} has several splits ({', '.join(there)}): give --split")
    return [one for one in rows if not split or str(one[1].get(_SPLIT)) == split]


def _tab_separated(text: str) -> Iterator[list[str]]:
    """Rows of a TSV; quotes are quotation where they part cells as they should, else text."""
    with suppress(csv.Error):
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True))
        if not any("\n" in cell and "\t" in cell for row in rows for cell in row):
            return iter(rows)
    return csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)


def path_cell(row: Row, column: str, where: str) -> str:
    """The path of an image in a row. Raises InputError: there is none, but the image perhaps."""
    name = row.get(column)
    if isinstance(name, Mapping | bytes):
        raise InputError(f"{where}: '{column}' holds images, not paths: write them to files first")
    if name in (None, ""):
        raise InputError(f"{where} has no path in '{column}'")
    return str(name)


def _words_of(cell: Any, column: str, several: bool, where: str) -> list[str]:
    if isinstance(cell, list | tuple):
        return [_cell_word(one) for one in cell]
    word = "" if cell is None else _cell_word(cell)
    if column.casefold() == "predictionstring":  # ImageNet's: a WordNet id, and a box
        word = word.partition(" ")[0]
    if several:
        separator = next((one for one in "|;," if one in word), None)
        return [part.strip() for part in word.split(separator or "|") if part.strip()]
    if not word:
        raise InputError(f"{where} has no label in '{column}'")
    return [word]


def _cell_word(value: Any) -> str:
    text = str(value).strip()
    # A column of whole numbers with gaps is kept as floats.
    return text[:-2] if _WHOLE_FLOAT.fullmatch(text) else text


def _words_of_indicators(row: Mapping[str, Any], columns: Sequence[str], where: str) -> list[str]:
    words = []
    for column in columns:
        value = _cell_word(row.get(column, ""))
        if value in ("1", "True", "true"):
            words.append(column)
        elif value not in ("0", "False", "false"):
            raise InputError(
                f"{where}: '{column}' holds '{value[:40]}', expected 0 or 1 in one column a class, "
                "or a column of labels (--label-column)"
            )
    return words
