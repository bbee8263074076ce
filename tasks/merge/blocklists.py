"""The entries of blocklists, in the forms in which such lists are published: text files with an
entry a line, CSV files with a column of entries. Not here: hosts (tasks/web_addresses.py).
"""

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from evaclip_model.errors import InputError, shorten_error
from evaclip_model.reading.urls import read_text
from tasks.merge.config import BlocklistConfig
from tasks.tables.text_tables import text_format
from tasks.web_addresses import read_host_entry

_HASH = re.compile(r"(?i)(?:(?:md5|sha1|sha256):)?([0-9a-f]{16,128})(?=\s|$)")


class EntryForm(NamedTuple):
    paths: Callable[[BlocklistConfig], Sequence[str]]
    read: Callable[[str], Sequence[str] | None]
    """A line -> its entries; None: it cannot be understood."""
    forms: str
    """What it may be, for the message."""
    columns: tuple[str, ...]
    """Names of the column of a CSV that holds them; the first that there is."""


def read_lists(paths: Sequence[str], entry: EntryForm) -> list[str]:
    """The entries of lists; a line that cannot be understood is refused by its number."""
    entries: list[str] = []
    for path in paths:
        try:
            lines = read_text(path).removeprefix("\ufeff").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"blocklist {path} cannot be read ({shorten_error(error)}): name a text file with "
                "one entry a line, or a CSV"
            ) from error
        for number, line in _list_cells(path, lines, entry):
            found = entry.read(line) if line and not line.startswith("#") else ()
            if found is None:
                raise InputError(
                    f"blocklist {path}, line {number}: '{line[:80]}' is not {entry.forms}: correct "
                    "the line or take it out"
                )
            entries += found
    return entries


def _list_cells(path: str, lines: Sequence[str], entry: EntryForm) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines of a list, of a CSV the cell in its column of entries."""
    if text_format(path) != "csv":
        yield from enumerate(map(str.strip, lines), start=1)
        return
    delimiter = "\t" if ".tsv" in path.lower() else ","
    column: int | None = None
    for number, line in enumerate(lines, start=1):
        text = line.lstrip("# ")
        row = [cell.strip() for cell in next(csv.reader([text], delimiter=delimiter), [])]
        is_comment = not row or line.startswith("#")
        if column is None:  # the header may be a comment, as abuse.ch publishes it
            names = [cell.lower() for cell in row]
            column = next((names.index(name) for name in entry.columns if name in names), None)
            if column is None and not is_comment:
                raise InputError(
                    f"blocklist {path} has no column {' or '.join(entry.columns)}: name its column "
                    "so, or write one entry a line into a .txt"
                )
        elif not is_comment:
            yield number, row[column] if column < len(row) else line


def _read_url_entry(line: str) -> list[str] | None:
    """The URL of a line, which may lack its scheme; the scheme does not matter."""
    url = re.split(r"\s+#", line)[0]
    scheme, separator, _ = url.partition("://")
    if separator:
        return [url] if scheme.lower() in ("http", "https") else None
    return [f"http://{url}"] if re.match(r"[\w.-]+\.\w+(?:[:/?]|$)", url) else None


def _read_hash_entry(line: str) -> list[str] | None:
    found = _HASH.match(line)
    return [found[1].lower()] if found else None


BLOCKED_TABLES: Mapping[str, EntryForm] = {
    "blocked_addresses": EntryForm(lambda lists: lists.urls, _read_url_entry, "a URL", ("url",)),
    "blocked_domains": EntryForm(
        *(lambda lists: lists.domains, read_host_entry),
        "a host name, a line of a hosts file or a rule ||name^",
        ("domain", "host", "hostname"),
    ),
    "blocked_hashes": EntryForm(
        *(lambda lists: lists.hashes, _read_hash_entry, "a hash in hex"),
        ("hash", "sha256", "md5", "sha1", "phash", "sha256_hash", "md5_hash"),
    ),
}
"""Table of the database -> the entries that it holds."""
