"""The files of metadata: globs of local files and of URLs, formats, the identity of a file.

URLs (s3://, gs://, hf://, https://) are opened by fsspec; a protocol's package is installed with
its own extra, and its credentials come from where that package looks for them.
Not here: what the columns mean (schema.py).
"""

import glob
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from evaclip_model.errors import InputError
from evaclip_model.files import refuse_special
from evaclip_model.reading.urls import is_url, list_store, open_filesystem
from tasks.artifacts.artifact import fingerprint_files
from tasks.index.adopted_shards import REMOTE_MARKS
from tasks.merge.config import MergeConfig, SourceConfig
from tasks.tables.text_tables import FORMATS, TextFormat, text_format

Format = Literal["parquet"] | TextFormat


def find_metadata(pattern: str, where: str) -> list[str]:
    """The files that a local glob or a URL with wildcards names, sorted; at least one."""
    local = [pattern] if Path(pattern).exists() else glob.glob(pattern)  # names hold any sign
    found = list_store(pattern, "glob") if is_url(pattern) else local
    if not found:
        raise InputError(f"{where}: no file matches '{pattern}'")
    for file in found:
        refuse_special(file)
    return sorted(found)


def format_of(path: str, source: SourceConfig) -> Format:
    if source.format != "auto":
        return source.format
    kind = "parquet" if path.lower().endswith(".parquet") else text_format(path)
    if kind is None:
        raise InputError(
            f"{path}: source '{source.name}' reads .parquet, {', '.join(FORMATS)}; set its "
            "'format' if it is one of them under another name; of a folder name FOLDER/*.parquet"
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
    if config.balance and isinstance(config.balance.entries, str):
        yield Outside("balance.entries", "balance.entries", config.balance.entries)


def file_identity(path: str) -> tuple[str, ...]:
    """Marks by which a file is still the same one: size, and time, version or checksum."""
    if is_url(path):
        information = open_filesystem(path).info(path)
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
