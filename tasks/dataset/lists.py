"""Lists of samples that may not be used, as people and organisations hand them over.

Not here: finding the samples (choose.py); which URLs are the same (tasks/merge/database.py).
"""

import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from evaclip_model.errors import InputError
from evaclip_model.reading.urls import read_text
from tasks.artifacts.artifact import DIGEST_CHARS

_HASH = re.compile(r"[0-9a-f]{32}|[0-9a-f]{64}")
SHA256 = re.compile(r"[0-9A-Fa-f]{64}")
_UID = re.compile(r"[\w.:\-]+", re.ASCII)


def read_hashes(files: Iterable[Path]) -> tuple[str, ...]:
    """The hashes of blocklists: the first word of every line, in lower case. InputError: naming the
    first line that begins with something else."""

    def read(line: str) -> str | None:
        word = line.split()[0].lower()
        return word if _HASH.fullmatch(word) else None

    return _read_entries(files, read, "an MD5 (32 hex digits) or a SHA-256 (64) at the beginning")


def read_takedowns(files: Iterable[Path]) -> tuple[str, ...]:
    """The entries of takedown lists, sorted, each once. InputError: naming the first line that is
    not a URL, a uid or a SHA-256."""

    def read(line: str) -> str | None:
        if SHA256.fullmatch(line):
            return line.lower()
        return line if is_url(line) or _UID.fullmatch(line) else None

    return _read_entries(files, read, "a URL (with http:// or https://), a uid or a SHA-256")


def takedowns_digest(entries: Iterable[str]) -> str:
    """Digest that stands for takedowns among an artifact's parents, whatever files list them."""
    text = "\n".join(sorted(set(entries)))
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARS]


def is_url(entry: str) -> bool:
    """Tell whether an entry of a takedown list is a URL."""
    return entry.lower().startswith(("http://", "https://"))


def _read_entries(
    files: Iterable[Path], read: Callable[[str], str | None], expected: str
) -> tuple[str, ...]:
    """Entries that `read` makes of all lines but empty ones and comments, which begin with #."""
    entries = set()
    for file in files:
        try:
            text = read_text(file)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file} cannot be read as a text file ({error})") from None
        for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
            if not line or line.startswith("#"):
                continue
            entry = read(line)
            if entry is None:
                raise InputError(f"{file}, line {number}: expected {expected}, got '{line[:80]}'")
            entries.add(entry)
    return tuple(sorted(entries))
