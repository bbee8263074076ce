"""Rows of CSV, TSV, JSON Lines and JSON files: every value is text, a bad line costs itself.

The rule for quotes (`quoting` says otherwise): in a CSV a value may stand in double quotes (RFC
4180: a quote inside is doubled, a line may end inside), and a quote that is not closed within
`MAX_LINES_OF_ROW` lines costs its line, not what follows. In a TSV, where many are written without
any rule, a value that follows RFC 4180 is read by it, and any other quote is a character. No type
is guessed: 1984 and 2021-03-01 are texts.

A JSON file is a list of objects, or COCO's captions: a row an annotation, with what is said of its
image. It is read into memory at once, its rows count as lines, and its name may end as that of JSON
Lines, and theirs as its own.
"""

import ast
import csv
import io
import json
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from enum import StrEnum
from itertools import count, islice
from typing import Any, Literal, NamedTuple

from evaclip_model.errors import InputError, shorten_error
from evaclip_model.reading.table_columns import tell_delimiter
from evaclip_model.reading.urls import open_binary

Quoting = Literal["auto", "quotes", "none"]
TextFormat = Literal["csv", "jsonl"]
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
FORMATS: dict[str, TextFormat] = {
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".jsonl", ".jsonlines", ".ndjson", ".json"), "jsonl"),
}
FIRST_ROWS = 10_000
"""Of JSON Lines, whose rows may have any columns."""
MAX_LINES_OF_ROW = 100
MAX_JSON_BYTES = 1 << 29
MAX_LINE_BYTES = 1 << 24
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_BOM = b"\xef\xbb\xbf"
_UNCLOSED = "unexpected end of data"
csv.field_size_limit(2 * MAX_LINE_BYTES)


class LineFlaw(StrEnum):
    NOT_UTF8 = "not_utf8"
    TOO_LONG = "line_too_long"
    UNCLOSED_QUOTE = "unclosed_quote"
    WRONG_NUMBER_OF_COLUMNS = "wrong_number_of_columns"
    NOT_JSON = "not_json"


class TextRow(NamedTuple):
    """One row, or a line that is none."""

    line: int
    """Number of its first line in the file, from 1."""
    values: dict[str, str | None]
    """By column; a column that a JSON row lacks is missing or None."""
    flaw: LineFlaw | None = None


def text_format(path: str) -> TextFormat | None:
    """The form of a file by its suffix, before a .gz, .zst or .bz2; None if it is not text."""
    return FORMATS.get(_file_suffix(path))


def read_text_table(
    path: str, kind: TextFormat, quoting: Quoting = "auto", header: bool = True
) -> Iterator[TextRow]:
    """Yield the rows of a file or URL, bad lines in their places. Without a `header`, a CSV's
    columns are `column0`, `column1`, ... A file that cannot be opened or read to its end, is
    UTF-16, or has two columns of the same name is an `InputError`."""
    if kind == "jsonl":
        yield from map(_json_row, _iterate_json(path))
        return
    names: list[str] | None = None
    for line, values, flaw in _csv_rows(path, quoting):
        if names is None and flaw is None:
            names = values if header else [f"column{number}" for number in range(len(values))]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise InputError(f"{path}, line 1: two columns are named '{twice[0]}'")
            if header:
                continue
        if flaw is None and names is not None and len(values) != len(names):
            flaw = LineFlaw.WRONG_NUMBER_OF_COLUMNS
        if flaw is not None or names is None:
            yield TextRow(line, {}, flaw)
        else:
            yield TextRow(line, dict(zip(names, values, strict=True)))


def column_names(path: str, kind: TextFormat, quoting: Quoting, header: bool) -> list[str]:
    """Columns of a file, in the order in which they are met in its first rows."""
    if kind == "csv":
        first = next((values for _, values, flaw in _csv_rows(path, quoting) if flaw is None), [])
        return first if header else [f"column{number}" for number in range(len(first))]
    rows = islice(read_text_table(path, kind), FIRST_ROWS)
    return list(dict.fromkeys(name for row in rows for name in row.values))


def parse_list(written: str, kind: TextFormat) -> list[Any] | None:
    """The values of a JSON list, as a row of JSON Lines has it; of CSV only those of a list of
    texts, in JSON or as pandas and numpy write one; None for what is a text."""
    found: Any = None
    if not written.startswith("["):
        return None
    try:
        found = json.loads(written)
    except (ValueError, RecursionError):
        if kind == "csv" and len(written) <= 10_000:
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                # numpy has no commas: Python would read all texts as one.
                found = ast.literal_eval(re.sub(r"(['\"])\s+(?=['\"])", r"\1, ", written))
    if isinstance(found, list) and (kind == "jsonl" or all(isinstance(one, str) for one in found)):
        return found
    return None


def _file_suffix(path: str) -> str:
    name = path.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return name[name.rfind(".") :] if "." in name else ""


_Line = tuple[int, str, LineFlaw | None]


def _open_text(path: str) -> io.BufferedReader:
    import pyarrow as pa  # configs import this module, and are loaded by `--help`

    try:
        compression = COMPRESSED.get(path[path.rfind(".") :].lower())
        return io.BufferedReader(pa.input_stream(open_binary(path), compression, 1 << 20), 1 << 20)
    except Exception as error:  # every protocol has its own kinds
        raise InputError(f"{path} cannot be opened ({shorten_error(error)})") from None


def _torn(path: str, error: Exception) -> InputError:
    """The sentence on a damaged compressed file, or one that its store stops giving."""
    return InputError(f"{path} cannot be read to its end ({shorten_error(error)}): fetch it again")


def _iterate_json(path: str) -> Iterator[_Line]:
    """The lines of JSON Lines, or the rows of a JSON file as such lines."""
    with _open_text(path) as reader:
        try:
            head = reader.peek(1 << 16).removeprefix(_BOM).lstrip()
            content = reader.read(MAX_JSON_BYTES + 1) if _is_document(path, head) else None
        except Exception as error:
            raise _torn(path, error) from None
        if content is None:
            yield from _read_lines(path, reader)
            return
    if len(content) > MAX_JSON_BYTES:
        raise InputError(f"{path} has more than {MAX_JSON_BYTES >> 20} MiB: write a row a line")
    try:
        rows = json.loads(content.removeprefix(_BOM), parse_float=str)
        if isinstance(rows, dict):
            images = {image["id"]: image for image in rows["images"]}
            rows = [images.get(one.get("image_id"), {}) | one for one in rows["annotations"]]
        if not isinstance(rows, list):
            raise TypeError
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{path} does not hold a table: expected a list of objects, an object a line, or "
            "COCO's images and annotations"
        ) from None
    for number, row in enumerate(rows, 1):
        yield number, json.dumps(row), None


def _is_document(path: str, head: bytes) -> bool:
    """Tell a JSON file from JSON Lines by its first bytes."""
    if head.startswith(b"[") or _file_suffix(path) != ".json":
        return head.startswith(b"[")
    first, _, more = head.partition(b"\n")
    with suppress(ValueError, RecursionError):
        return "annotations" in json.loads(first) and not more.strip()
    return True


def _iterate_lines(path: str) -> Iterator[_Line]:
    """(number, text without its end, what is wrong with it) of every line that is not empty."""
    with _open_text(path) as reader:
        yield from _read_lines(path, reader)


def _read_lines(path: str, reader: io.BufferedReader) -> Iterator[_Line]:
    limit = MAX_LINE_BYTES + 8  # with the marks at its ends
    for number in count(1):
        try:
            line = rest = reader.readline(limit)
            while len(rest) == limit and not rest.endswith(b"\n"):
                rest = reader.readline(limit)  # it is too long whatever follows
        except Exception as error:
            raise _torn(path, error) from None
        if not line:
            return
        if number == 1 and line.startswith(_UTF16):
            raise InputError(f"{path} is UTF-16: save it as UTF-8")
        content = line.removeprefix(_BOM) if number == 1 else line
        content = content.removesuffix(b"\n").removesuffix(b"\r")
        if len(content) > MAX_LINE_BYTES:
            yield number, "", LineFlaw.TOO_LONG
        elif content:
            try:
                yield number, content.decode(), None
            except UnicodeDecodeError:
                yield number, "", LineFlaw.NOT_UTF8


def _csv_rows(path: str, quoting: Quoting) -> Iterator[tuple[int, list[str], LineFlaw | None]]:
    """(number, values, flaw) of every row; lenient: what follows no rule for quotes has none."""
    is_tsv, lines = _file_suffix(path) == ".tsv", _iterate_lines(path)
    delimiter, is_lenient = "\t" if is_tsv else "", is_tsv and quoting == "auto"
    waiting: deque[_Line] = deque()
    width: int | None = None

    def following() -> _Line | None:
        return waiting.popleft() if waiting else next(lines, None)

    while (first := following()) is not None:
        number, text, flaw = first
        delimiter = delimiter or tell_delimiter(text)
        values: list[str] | None = None
        if flaw is None and (quoting == "none" or '"' not in text):
            values = text.split(delimiter)
        elif flaw is None:
            values, taken = _quoted_row(first, following, delimiter, is_lenient)
            if is_lenient and (values is None or (taken and len(values) != width)):
                values = text.split(delimiter)
                waiting.extendleft(reversed(taken))
            elif values is None:
                waiting.extendleft(reversed(taken))
                flaw = LineFlaw.UNCLOSED_QUOTE
        width = width if width is not None or values is None else len(values)
        yield number, values or [], flaw


def _quoted_row(
    first: _Line, following: Callable[[], _Line | None], delimiter: str, is_lenient: bool
) -> tuple[list[str] | None, list[_Line]]:
    """(values of a row with quotes, further lines that were taken for it); None if a quote is not
    closed, or, leniently, if the row does not follow RFC 4180."""
    number, text, _ = first
    taken: list[_Line] = []
    while True:
        try:
            return next(csv.reader([text], delimiter=delimiter, strict=True)), taken
        except csv.Error as error:
            if _UNCLOSED not in str(error):
                if is_lenient or "\r" in text:  # which nothing reads in the middle of a line
                    return None, taken
                return next(csv.reader([text], delimiter=delimiter)), taken
        more = following() if len(taken) < MAX_LINES_OF_ROW else None
        if more is None:
            return None, taken
        taken.append(more)
        if more[2] is not None:
            return None, taken
        text += "\n" * (more[0] - number - text.count("\n")) + more[1]


parse_as_written = json.JSONDecoder(
    parse_float=str, parse_int=str, parse_constant=lambda _: None
).decode
"""JSON whose numbers are texts; NaN is a gap, which Python's libraries write so."""


def _json_row(line: _Line) -> TextRow:
    number, text, flaw = line
    if flaw is not None:
        return TextRow(number, {}, flaw)
    try:
        found = parse_as_written(text)
        if not isinstance(found, dict):
            return TextRow(number, {}, LineFlaw.NOT_JSON)
        for name, value in found.items():
            if not isinstance(value, str):
                nested = json.loads(text)[name] if isinstance(value, list | bool) else None
                found[name] = None if nested is None else json.dumps(nested, ensure_ascii=False)
            elif not value.isascii():  # halves of characters, which no text file can hold
                found[name] = value.encode("utf-8", "replace").decode()
    except (ValueError, RecursionError):
        return TextRow(number, {}, LineFlaw.NOT_JSON)
    return TextRow(number, found)
