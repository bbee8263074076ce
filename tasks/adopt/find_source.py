"""The files that a source's `files` names (globs, folders, lists of shards, single files, here or
at a URL), their form, and what stands for them in an artifact's address. Not here: reading images
and captions (read_pairs.py), packing (adopt.py)."""

import glob
import hashlib
import math
import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import braceexpand
import pyarrow as pa

from evaclip_model.errors import InputError
from evaclip_model.files import refuse_special
from evaclip_model.reading.samples import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS, group_members
from evaclip_model.reading.table_columns import match_column
from evaclip_model.reading.tar_file import BrokenTar, Member, TarReader
from evaclip_model.reading.urls import ask_store, is_url, list_store, read_text
from tasks.adopt.config import AdoptedSource, Form
from tasks.artifacts.artifact import DIGEST_CHARS
from tasks.index.adopted_shards import sizes_and_marks
from tasks.tables.parquet_tables import parquet_schema
from tasks.tables.text_tables import text_format

TAR = ".tar"
PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
LIST = ".txt"
MOST_NAMES = 10_000_000
"""More names than braces may stand for: they would be in memory before one is looked for."""
_WILD = frozenset("*?[")
_LOOKED_AT = 200
"""Samples of the first shard that are looked at before anything is adopted."""


@dataclass(frozen=True)
class FoundSource:
    source: AdoptedSource
    form: Form
    base: str
    """Folder that all files lie in: names of samples and shards begin below it."""
    files: tuple[str, ...]
    """Absolute paths or URLs, in order: shards, tables, parquet files, or images and captions."""

    def name_of(self, file: str) -> str:
        """A file's path below `base`, with forward slashes."""
        return posixpath.relpath(file, self.base)


def find_source(source: AdoptedSource) -> FoundSource:
    """The files of a source, and their form; refuse what is not there, has no form, or holds no
    image with a caption at all."""
    where = f"adopt.sources '{source.name}'"
    base, files = _list_files(source.files, where)
    if not files:
        raise InputError(f"{where}: there is no file in {source.files}")
    form = source.form or _tell_form(source, files, where)
    if form in ("shards", "folder") and (source.image or source.caption):
        raise InputError(f"{where}: form '{form}' has no columns: leave 'image' and 'caption' out")
    chosen = tuple(file for file in files if _may_be(form, file.lower()))
    if form == "table":  # beside another table, JSON is what is said of it
        chosen = tuple(file for file in chosen if _file_suffix(file) != "json") or chosen
    if not chosen:
        among = f"none of {len(files):,} files in {source.files}"
        raise InputError(f"{where}: {among} is of the form '{form}', the first is {files[0]}")
    for file in chosen:
        refuse_special(file)
    found = FoundSource(source, form, base, chosen)
    if form == "shards":
        _refuse_without_pairs(found, where)
    return found


def _may_be(form: Form, name: str) -> bool:
    """Tell whether a file of this name, in lower case, has to do with a source of the form."""
    if form == "shards":
        return name.endswith(TAR)
    if form == "folder":
        return _file_suffix(name) in (*IMAGE_EXTENSIONS, *CAPTION_EXTENSIONS)
    return name.endswith(".parquet") or (form == "table" and text_format(name) is not None)


def source_mark(found: FoundSource) -> str:
    """A mark that changes when the files do, of names and parts of content, 16 hex characters; the
    images behind a table are known by the table alone."""
    return _short_hash("".join([found.form, *_identify_files(found)]))


def mark_files(found: FoundSource) -> dict[str, str]:
    """File -> a mark that changes with its name or its content, 16 hex characters."""
    return dict(zip(found.files, map(_short_hash, _identify_files(found)), strict=True))


def _identify_files(found: FoundSource) -> Iterator[str]:
    for file, known in zip(found.files, sizes_and_marks(found.files), strict=True):
        if known is None and found.form != "folder":
            raise InputError(f"{file} cannot be read")
        size, mark = known or (0, "unreadable")  # one file, which costs itself
        yield f"{found.name_of(file)}\0{size}\0{mark}\0"


def _short_hash(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:DIGEST_CHARS]


def without_known(found: FoundSource, known: Set[str]) -> FoundSource:
    """The source with those of its files alone that have none of the `known` marks; in a folder,
    with the images that have none and their captions."""
    new = [file for file, mark in mark_files(found).items() if mark not in known]
    if found.form == "folder":
        images = [one for one in new if _file_suffix(one) in IMAGE_EXTENSIONS]
        stems = {posixpath.splitext(one)[0] for one in images}
        new = [one for one in found.files if posixpath.splitext(one)[0] in stems]
    return replace(found, files=tuple(new))


def _list_files(pattern: str, where: str) -> tuple[str, list[str]]:
    """(folder that holds them, files) that a pattern names, sorted."""
    if pattern.startswith("file://"):
        pattern = pattern.removeprefix("file://")
    if os.path.lexists(pattern):
        pattern = glob.escape(pattern)  # a name may hold any sign
    expanded = _expand_braces(pattern, where) if "{" in pattern else [pattern]
    if len(expanded) == 1 and not _WILD & set(pattern):
        if _is_folder(pattern):
            base = pattern.rstrip("/") if is_url(pattern) else str(Path(pattern).absolute())
            return base, _walk_files(base)
        if pattern.lower().endswith(LIST):
            return _listed_files(pattern, where)
    files: list[str] = []
    for one in expanded:
        matches = _list_matches(one)
        if not matches:
            raise InputError(f"{where}: no file matches '{one}'")
        for match in matches:
            files += _walk_files(match) if _is_folder(match) else [match]
    return _base_of(expanded), sorted(dict.fromkeys(files))


def _expand_braces(pattern: str, where: str) -> list[str]:
    try:
        ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern)
        if math.prod(abs(int(last) - int(first)) + 1 for first, last in ranges) > MOST_NAMES:
            raise ValueError(f"they stand for more than {MOST_NAMES:,} names")
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise InputError(f"{where}: braces that cannot be expanded ({error})") from None


def _listed_files(path: str, where: str) -> tuple[str, list[str]]:
    """The files that a list names, one a line, as they lie from the list's folder."""
    folder = posixpath.dirname(path) if is_url(path) else str(Path(path).absolute().parent)
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except FileNotFoundError:
        raise InputError(f"{where}: no file matches '{path}'") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: {path} cannot be read as a list ({error})") from None
    named = {
        number: line if is_url(line) else posixpath.normpath(posixpath.join(folder, line))
        for number, line in enumerate(lines, 1)
        if line and line[0] != "#"
    }
    missing = [number for number, file in named.items() if not _is_file(file)]
    if missing:
        raise InputError(
            f"{where}: {len(missing):,} of the {len(named):,} files that {path} lists are missing, "
            f"the first is in line {missing[0]}: {lines[missing[0] - 1]} (a table ends in .csv)"
        )
    local = [posixpath.dirname(file) for file in named.values() if not is_url(file)]
    return os.path.commonpath(local) if local else folder, list(dict.fromkeys(named.values()))


def _is_folder(location: str) -> bool:
    return bool(ask_store(location, "isdir")) if is_url(location) else os.path.isdir(location)


def _is_file(location: str) -> bool:
    return bool(ask_store(location, "isfile")) if is_url(location) else os.path.isfile(location)


def _list_matches(pattern: str) -> list[str]:
    if not is_url(pattern):
        return sorted(str(Path(one).absolute()) for one in glob.glob(pattern, recursive=True))
    if not _WILD & set(pattern):
        return [pattern] if _is_file(pattern) or _is_folder(pattern) else []
    return list_store(pattern, "glob")


def _walk_files(folder: str) -> list[str]:
    """Every file below a folder, without hidden ones and what macOS adds."""
    if is_url(folder):
        files = list_store(folder, "find")
        return [file for file in files if not posixpath.basename(file).startswith(".")]
    found, walked, top = [], set[str](), os.path.realpath(folder)
    for at, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(at)
        if real in walked or top.startswith(f"{real.rstrip('/')}/"):  # a link that leads back
            folders.clear()
            continue
        walked.add(real)
        folders[:] = [name for name in folders if name != "__MACOSX" and not name.startswith(".")]
        found += [os.path.join(at, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _base_of(patterns: Sequence[str]) -> str:
    """The deepest folder that all patterns name without wildcards."""
    folders = [posixpath.dirname(re.split(r"[*?[]", one)[0]) for one in patterns]
    if is_url(patterns[0]):
        return posixpath.commonprefix([f"{one}/" for one in folders]).rpartition("/")[0]
    return os.path.commonpath(list(map(os.path.abspath, folders)))


def _file_suffix(name: str) -> str:
    return name.rpartition(".")[2].lower() if "." in posixpath.basename(name) else ""


def _tell_form(source: AdoptedSource, files: Sequence[str], where: str) -> Form:
    """The form that the files have; refuse none, and two that exclude each other."""
    by_suffix: defaultdict[str, list[str]] = defaultdict(list)
    for file in files:
        by_suffix[_file_suffix(file)].append(file)
    if by_suffix["tar"]:
        return "shards"
    packed = [file for file in files if file.lower().endswith(PACKED_TARS)]
    images = [file for suffix in IMAGE_EXTENSIONS for file in by_suffix[suffix]]
    captions = {file.rpartition(".")[0] for end in CAPTION_EXTENSIONS for file in by_suffix[end]}
    paired = sum(file.rpartition(".")[0] in captions for file in images)
    json_files = [] if paired or by_suffix["parquet"] or by_suffix["arrow"] else by_suffix["json"]
    text = [one for one in files if text_format(one) and _file_suffix(one) != "json"] or json_files
    tables = text or by_suffix["parquet"]
    if paired and tables and not text:  # img2dataset puts a table of addresses beside its files
        names = parquet_schema(tables[0], where).names
        if match_column(names, "urls") and not match_column(names, "images"):
            tables = []
    if packed:
        why = (
            f"{len(packed):,} shards are compressed, the first is {packed[0]}: unpack them to "
            ".tar, because training reads them where they lie"
        )
    elif paired and tables:
        why = (
            f"{source.files} holds {paired:,} images with a .txt beside them and {tables[0]}: set "
            "form = 'folder', or name the table as 'files'"
        )
    elif paired:
        return "folder"
    elif text:
        return "table"
    elif tables:
        schema = parquet_schema(tables[0], where)
        looked_at = [schema.field(source.image)] if source.image in schema.names else schema
        return "parquet" if any(is_image_type(field.type) for field in looked_at) else "table"
    elif images:
        why = (
            f"{len(images):,} images in {source.files}, but no captions: put NAME.txt beside "
            "NAME.jpg, or a table of image paths and captions"
        )
    else:
        kinds = sorted(
            f".{suffix}" if suffix else "no suffix" for suffix, of in by_suffix.items() if of
        )
        why = (
            f"{source.files} holds {len(files):,} files ({', '.join(kinds)}), but no shards "
            "(.tar), no images with captions, no table (.csv, .tsv, .jsonl, .json) and no parquet "
            "(which to_parquet makes of .arrow)"
        )
    raise InputError(f"{where}: {why}")


def is_image_type(kind: pa.DataType) -> bool:
    """Tell whether a column may hold images: bytes, or Hugging Face's struct of bytes and path."""
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and is_image_type(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def iterate_members(shard: str) -> Iterator[Mapping[str, Member]]:
    """Members by extension of every sample of a shard on this machine; raises BrokenTar and OSError
    where it cannot be read to its end."""
    with open(shard, "rb", buffering=0) as tar:
        yield from (parts for _, parts in group_members(TarReader(tar.fileno())))


def is_pair(parts: Collection[str]) -> bool:
    """Tell whether a sample with members of these extensions has an image and a caption."""
    return all(
        any(name in parts for name in names) for names in (CAPTION_EXTENSIONS, IMAGE_EXTENSIONS)
    )


def _refuse_without_pairs(found: FoundSource, where: str) -> None:
    """Refuse shards of which the first samples of the first are none; the rest is verified."""
    first = found.files[0]
    if is_url(first):
        return
    try:
        looked_at = list(islice(iterate_members(first), _LOOKED_AT))
    except (BrokenTar, OSError):
        return  # one shard; verification says what is wrong with it
    if any(map(is_pair, looked_at)) or (len(found.files) > 1 and not looked_at):
        return
    members = sorted({name for parts in looked_at for name in parts})
    raise InputError(
        f"{where}: {first} has no image with a .txt beside it among its first {len(looked_at):,} "
        f"samples, only members named {', '.join(f'.{name}' for name in members) or 'none'}: a "
        "sample is NAME.jpg and NAME.txt, one behind the other, and NAME ends at its first dot"
    )
