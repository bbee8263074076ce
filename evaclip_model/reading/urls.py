"""Files that may lie behind a URL. Large ones are shard_store.py's."""

import posixpath
from pathlib import Path
from typing import Any

from evaclip_model.errors import InputError


def is_url(location: Path | str) -> bool:
    """Return whether a location is a URL, not a path of this machine."""
    return isinstance(location, str) and "://" in location


def resolve_location(folder: str, path: str) -> str:
    """The place of `path`, which a file in `folder` (a path or a URL) names: itself a URL, or
    relative to the folder. A store knows no `..`: a key of that name would not exist."""
    if is_url(path):
        return path
    if not is_url(folder):
        return f"{folder or '.'}/{path}"
    scheme, _, place = folder.partition("://")
    return f"{scheme}://{posixpath.normpath(f'{place}/{path}')}"


def open_filesystem(url: str) -> Any:
    """fsspec's filesystem for a URL; raises InputError if nothing installed knows its kind."""
    import fsspec  # only who reads from elsewhere waits for it

    try:
        return fsspec.filesystem(url.partition("://")[0])
    except (ImportError, ValueError) as error:
        raise InputError(f"{url} cannot be read: {error}") from None


def open_binary(location: str) -> Any:
    """A file of this machine or at a URL, open for reading bytes; raises as `open_filesystem`, and
    whatever its protocol has for a file that cannot be opened."""
    if is_url(location):
        return open_filesystem(location).open(location, "rb")
    return open(location, "rb")


def read_text(location: Path | str) -> str:
    """Content of a small text file on this machine or at a URL: UTF-8, without a byte order mark.

    Raises OSError, UnicodeDecodeError, and InputError as `open_filesystem`.
    """
    if not is_url(location):
        return Path(location).read_text(encoding="utf-8-sig")
    try:
        content: bytes = open_filesystem(str(location)).cat_file(str(location))
    except (OSError, InputError):
        raise
    except Exception as error:  # every protocol has its own kinds: botocore's are not OSErrors
        raise OSError(str(error) or type(error).__name__) from error
    return content.decode("utf-8-sig")
