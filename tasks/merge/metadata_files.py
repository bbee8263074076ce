"""The files of metadata: globs of local files and of URLs, formats, the identity of a file.

URLs (s3://, gs://, hf://, https://) are opened by fsspec; a protocol's package is installed with
its own extra, and its credentials come from where that package looks for them.
Not here: what the columns mean (schema.py).
"""

import glob
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import fsspec

from evaclip_model.errors import InputError, shorten_error
from evaclip_model.reading.urls import is_url
from tasks.artifacts.artifact import fingerprint_files
from tasks.index.adopted_shards import REMOTE_MARKS
from tasks.merge.config import MergeConfig, SourceConfig
from tasks.tables.text_tables import FORMATS, TextFormat, text_format

Format = Literal["parquet"] | TextFormat


def find_metadata(pattern: str, where: str) -> list[str]:
    """The files that a local glob or a URL with wildcards names, sorted; at least one."""
    if is_url(pattern):
        filesystem = file_system(pattern)
        try:
            names = filesystem.glob(pattern)
        except Exception as error:  # every protocol has its own kinds: botocore's are not OSErrors
            raise InputError(
                f"{where}: '{pattern}' cannot be listed ({shorten_error(error)}): check the "
                "address and, for private or gated data, the credentials in the environment"
            ) from error
        found = [filesystem.unstrip_protocol(name) for name in names]
    else:
        found = glob.glob(pattern)
    if not found:
        raise InputError(f"{where}: no file matches '{pattern}'")
    return sorted(found)


def file_system(url: str) -> Any:
    try:
        return fsspec.filesystem(url.partition("://")[0])
    except (ImportError, ValueError) as error:
        raise InputError(f"'{url}' cannot be opened: {shorten_error(error)}") from error


def format_of(path: str, source: SourceConfig) -> Format:
    if source.format != "auto":
        return source.format
    kind = "parquet" if path.lower().endswith(".parquet") else text_format(path)
    if kind is None:
        raise InputError(
            f"{path}: source '{source.name}' reads .parquet, {', '.join(FORMATS)}; set its "
            "'format' if the file is one of them under another name"
        )
    return kind


class Outside(NamedTuple):
    """Something a merge reads that is not in its settings; it belongs in the artifact's address."""

    role: str
    where: str
    files: str


def outside_files(config: MergeConfig) -> Iterator[Outside]:
    for source in config.sources:
        name, where = source.name, f"sources '{source.name}'"
        yield Outside(name, where, source.files)
        if source.diff_against:
            yield Outside(f"{name}.diff_against", f"{where}.diff_against", source.diff_against)
        for number, sidecar in enumerate(source.sidecars):
            part = f"sidecars.{number}"
            yield Outside(f"{name}.{part}", f"{where}.{part}", sidecar.files)
    for kind, paths in config.filters.blocklists:
        for number, path in enumerate(paths):
            yield Outside(f"blocklists.{kind}.{number}", f"filters.blocklists.{kind}", path)


def file_identity(path: str) -> tuple[str, ...]:
    """Marks by which a file is still the same one: size, and time, version or checksum."""
    if is_url(path):
        information = file_system(path).info(path)
        marks = [mark for mark in ("size", *REMOTE_MARKS) if mark in information]
        return (path, *(str(information[mark]) for mark in marks))
    status = Path(path).stat()
    return (path, str(status.st_size), str(status.st_mtime_ns))


def mark_of(path: Path | str) -> str:
    """A metadata file's mark, the same wherever it lies: its fingerprint, or a URL's identity's."""
    return remote_fingerprint([str(path)]) if is_url(str(path)) else fingerprint_files(Path(path))


def remote_fingerprint(paths: Sequence[str]) -> str:
    """Identity of files behind URLs, without reading them: 16 hex characters."""
    text = "\0".join("\0".join(file_identity(path)) for path in paths)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
