"""Lists of samples that may not be used, as people and organisations hand them over.

Covers: text files of hashes (blocklists), text files of URLs, uids and hashes (takedowns).
Not here: finding the samples (choose.py); which URLs are the same (tasks/merge/database.py).
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from evaclip_model.errors import InputError
from evaclip_model.reading.urls import read_text
from tasks.artifacts.artifact import DIGEST_CHARS

_HASH = re.compile(r"[0-9a-f]{32}|[0-9a-f]{64}")
SHA256 = re.compile(r"[0-9A-Fa-f]{64}")
_UID = re.compile(r"[\w.:\-]+", re.ASCII)


def read_hashes(files: Iterable[Path]) -> tuple[str, ...]:
    """The hashes of blocklists: the first word of every line, in lower case.

    Raises:
        InputError: naming the first line that begins with something else.
    """
    hashes = set()
    for file in files:
        for number, line in _iterate_lines(file):
            word = line.split()[0].lower()
            if not _HASH.fullmatch(word):
                raise InputError(
                    f"{file}, line {number}: expected an MD5 (32 hex digits) or a SHA-256 (64) "
                    f"at the beginning, got '{word[:80]}'"
                )
            hashes.add(word)
    return tuple(sorted(hashes))


def read_takedowns(files: Iterable[Path]) -> tuple[str, ...]:
    """The entries of takedown lists, sorted, each once.

    Raises:
        InputError: naming the first line that is not a URL, a uid or a SHA-256.
    """
    entries = set()
    for file in files:
        for number, line in _iterate_lines(file):
            if is_url(line):
                entries.add(line)
            elif _UID.fullmatch(line):
                entries.add(line.lower() if SHA256.fullmatch(line) else line)
            else:
                raise InputError(
                    f"{file}, line {number}: expected a URL (with http:// or https://), a uid or a "
                    f"SHA-256, got '{line[:80]}'"
                )
    return tuple(sorted(entries))


def takedowns_digest(entries: Iterable[str]) -> str:
    """Digest that stands for takedowns among an artifact's parents, whatever files list them."""
    text = "\n".join(sorted(set(entries)))
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARS]


def is_url(entry: str) -> bool:
    """Tell whether an entry of a takedown list is a URL."""
    return entry.lower().startswith(("http://", "https://"))


def _iterate_lines(file: Path) -> Iterator[tuple[int, str]]:
    """(number, content) of all lines but empty ones and comments, which begin with #."""
    try:
        text = read_text(file)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as a text file ({error})") from None
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.strip()
        if content and not content.startswith("#"):
            yield number, content
