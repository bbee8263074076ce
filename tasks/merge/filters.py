"""The rules a row must pass (rules.json, in the order in which they are asked) as SQL that gives a
row's reason under a `FilterConfig`; rules that are off are left out of it.

Blocklists among them are read in the forms in which such lists are published: text files with an
entry a line, CSV files with a column of entries. Not here: the columns that rules are asked about
(schema.py, sql/normalise.sql); duplicates (dedupe.sql); hosts (tasks/web_addresses.py).
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from evaclip_model.errors import InputError, shorten_error
from evaclip_model.reading.urls import read_text
from tasks.merge.config import BlocklistConfig, FilterConfig
from tasks.tables.text_tables import text_format
from tasks.web_addresses import read_host_entry

KNOWN_TAGS = ("UNLIKELY", "UNSURE", "NSFW")
LABELS_OF_A_DOMAIN = 6
"""A blocked name with more labels than this blocks that very host only."""

HOST = r"regexp_extract(address, '^(?:\[[^\]]*\]|[^/:]*)')"
HOST_AND_ABOVE = (
    HOST,
    *(
        f"array_to_string(list_slice(string_split({HOST}, '.'), -{labels}, -1), '.')"
        for labels in range(1, LABELS_OF_A_DOMAIN + 1)
    ),
)
HASHES = ("md5(url)", "md5(raw_url)", "sha256(url)", "sha256(raw_url)", "lower(image_hash)")
_HASH = re.compile(r"(?i)(?:(?:md5|sha1|sha256):)?([0-9a-f]{16,128})(?=\s|$)")


class Rule(NamedTuple):
    """One reason to drop a row."""

    reason: str
    fails: str
    """SQL over the columns of `normalised`, true when the row fails; `$name` is a field of
    `FilterConfig`."""
    needs: tuple[str, ...] = ()
    """Fields of `FilterConfig` without which the rule is off: unset, empty, or "keep"."""

    def is_on(self, filters: FilterConfig) -> bool:
        return all(attrgetter(name)(filters) not in (None, (), "keep") for name in self.needs)


def _list_values(values: Iterable[str], table: str) -> str:
    return " OR ".join(f"{value} IN (SELECT entry FROM {table})" for value in values)


_LISTED = {
    "blocked_domain": _list_values(HOST_AND_ABOVE, "blocked_domains"),
    "blocked_hash": _list_values(HASHES, "blocked_hashes"),
}
RULES = tuple(
    Rule(one["reason"], one["fails"].format_map(_LISTED), tuple(one.get("needs", ())))
    for one in json.loads(Path(__file__).with_name("rules.json").read_text())
)
UNREADABLE_LINE = "unreadable_line"
"""A line of a text file that is not a row."""
REASONS = (
    UNREADABLE_LINE,
    *dict.fromkeys(rule.reason for rule in RULES),
    "withdrawn",
    "duplicate_in_source",
    "duplicate_across_sources",
    "no_entry",
    "too_frequent",
    "given_before",
    "not_selected",
)
"""Why a row is dropped: the first, in this order, that applies to it."""


def reason_expression(filters: FilterConfig) -> str:
    """SQL that gives the first rule a row fails, NULL for a row that passes."""
    on = (rule for rule in RULES if rule.is_on(filters))
    cases = "\n      ".join(f"WHEN {rule.fails} THEN '{rule.reason}'" for rule in on)
    return f"CASE {cases} END"


def listed_expression() -> str:
    """SQL of the entries of blocklists that a blocked row may match; none of any other."""
    entries = ", ".join(("address", *HOST_AND_ABOVE, *HASHES))
    return f"CASE WHEN starts_with(reason, 'blocked_') THEN [{entries}] END"


def rule_parameters(filters: FilterConfig) -> dict[str, Any]:
    """Values of the parameters that `RULES` name."""
    return {
        **filters.model_dump(mode="json", exclude={"blocklists"}),
        "known_tags": [*KNOWN_TAGS, *filters.unsafe_tags],
    }


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


BLOCKED_TABLES: Mapping[str, EntryForm] = {
    "blocked_addresses": EntryForm(lambda lists: lists.urls, _read_url_entry, "a URL", ("url",)),
    "blocked_domains": EntryForm(
        *(lambda lists: lists.domains, read_host_entry),
        "a host name, a line of a hosts file or a rule ||name^",
        ("domain", "host", "hostname"),
    ),
    "blocked_hashes": EntryForm(
        lambda lists: lists.hashes,
        lambda line: [found[1].lower()] if (found := _HASH.match(line)) else None,
        "a hash in hex",
        ("hash", "sha256", "md5", "sha1", "phash", "sha256_hash", "md5_hash"),
    ),
}
"""Table of the database -> the entries that it holds."""
