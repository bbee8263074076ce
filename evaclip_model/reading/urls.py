"""Files that may lie behind a URL. Large ones are shard_store.py's."""

import json
import os
import posixpath
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from evaclip_model.errors import InputError, shorten_error
from evaclip_model.files import refuse_special

WORKING_COPY = "working-copy.json"
"""In a folder whose files may be at a URL instead: `url` and `name` of its `WorkingCopy`."""


class WorkingCopy(NamedTuple):
    """A folder that has some of the files of a store, at the same paths below both."""

    place: str
    """Absolute path of the folder, without links in it."""
    url: str
    name: str
    """Unlike any other working copy's."""


def is_url(location: Path | str) -> bool:
    """Return whether a location is a URL, not a path of this machine."""
    return isinstance(location, str) and "://" in location


def resolve_location(folder: str, path: str) -> str:
    """The place of `path`, which a file in `folder` (a path or a URL) names: itself a URL, or
    relative to the folder. A store knows no `..`: a key of that name would not exist."""
    if is_url(path):
        return path
    if not is_url(folder):
        return locate_file(f"{folder or '.'}/{path}")
    scheme, _, place = folder.partition("://")
    return f"{scheme}://{posixpath.normpath(f'{place}/{path}')}"


def locate_file(path: str) -> str:
    """A path of this machine, or the URL of a file that a working copy has only at its store."""
    copy = find_working_copy(os.path.dirname(path))
    if copy is None or os.path.exists(path):
        return path
    return f"{copy.url}/{os.path.relpath(path, copy.place)}"


@lru_cache(4096)
def find_working_copy(folder: str) -> WorkingCopy | None:
    """The working copy that a folder lies in; None: it is in none."""
    inside = Path(os.path.abspath(folder))
    for above in (inside, *inside.parents):
        if (found := above / WORKING_COPY).is_file():
            return WorkingCopy(str(above), **json.loads(found.read_text()))
    return None


def open_filesystem(url: str) -> Any:
    """fsspec's filesystem for a URL; raises InputError if nothing installed knows its kind."""
    import fsspec  # only who reads from elsewhere waits for it

    try:
        return fsspec.filesystem(url.partition("://")[0])
    except (ImportError, ValueError, TypeError) as error:  # TypeError: ftp:// wants more than a URL
        raise InputError(f"{url} cannot be read: {error}") from None


def ask_store(location: str, question: str) -> Any:
    """Ask a store's filesystem a `question`, one of its methods; its own kinds of errors come back
    as one sentence."""
    files = open_filesystem(location)
    try:
        return getattr(files, question)(location)
    except Exception as error:  # every protocol has its own kinds
        raise InputError(
            f"{location} cannot be listed ({shorten_error(error)}): check the address and, for "
            "private or gated data, the credentials in the environment"
        ) from None


def list_store(location: str, question: str) -> list[str]:
    """The URLs that a store's filesystem names to a `question`, sorted."""
    scheme = location.partition("://")[0]
    names = map(str, ask_store(location, question))
    return sorted(name if is_url(name) else f"{scheme}://{name}" for name in names)


def open_binary(location: str) -> Any:
    """A file of this machine or at a URL, open for reading bytes; raises as `open_filesystem` and
    `refuse_special`, and whatever its protocol has for a file that cannot be opened."""
    if is_url(location):
        return open_filesystem(location).open(location, "rb")
    refuse_special(location)
    return open(location, "rb")


def read_text(location: Path | str) -> str:
    """Content of a small text file on this machine or at a URL: UTF-8, without a byte order mark.

    Raises OSError, UnicodeDecodeError, InputError as `open_filesystem` and `refuse_special`.
    """
    if not is_url(location):
        refuse_special(location)
        return Path(location).read_text(encoding="utf-8-sig")
    return _fetch(str(location)).decode("utf-8-sig")


def read_range(location: str, start: int, size: int) -> bytes:
    """`size` bytes of a file on this machine or at a URL, fewer where it ends before; raises
    OSError, and InputError as `open_filesystem`."""
    if is_url(location):
        return _fetch(location, start=start, end=start + size)
    with open(location, "rb") as file:
        file.seek(start)
        return file.read(size)


def _fetch(url: str, **part: int) -> bytes:
    try:
        content: bytes = open_filesystem(url).cat_file(url, **part)
    except (OSError, InputError):
        raise
    except Exception as error:  # every protocol has its own kinds: botocore's are not OSErrors
        raise OSError(str(error) or type(error).__name__) from error
    return content
