"""The published webdataset layout of evaluation sets, as far as evaluation and training share it.

classnames.txt, zeroshot_classification_templates.txt    one a line (sets with classes)
dataset_type.txt                                         "retrieval" or "multilabel"
test/nshards.txt, test/0.tar ... test/N-1.tar            KEY.webp|png|jpg|..., and with it
                                                         KEY.cls, .npy or .txt, by its kind
"""

import hashlib
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

from evaclip_model.errors import InputError, shorten_error
from evaclip_model.reading.samples import IMAGE_EXTENSIONS
from evaclip_model.reading.urls import read_text

CLASSNAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
DATASET_TYPE = "dataset_type.txt"
SPLIT = "test"
"""Folder of the tars."""
TRAIN = "train"
"""Folder beside it of the tars that probes learn from; a whole set may lie there instead."""
SHARDS = "nshards.txt"

_ANSWER_BYTES = 16 << 20
"""Most that a label, a vector or the captions of one image may take."""
_LABEL_DIGITS = 9
_SYSTEM_FILE = re.compile(
    r"(^|/)((\._[^/]*|\.DS_Store|Thumbs\.db|desktop\.ini)$|(__MACOSX|PaxHeaders?)(\.[^/]*)?/)"
)


@dataclass(frozen=True)
class Span:
    """Bytes of one tar member: where its content starts in its file, and how long it is."""

    tar: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """The member's content. Raises InputError: the file is shorter than its index says."""
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) != self.size:
            raise InputError(f"{self.tar} has changed while it was read: run the evaluation again")
        return content


@dataclass(frozen=True)
class TarMember:
    """One file of a sample."""

    span: Span
    sha256: str
    """Of an image, in hex, where it was asked for."""
    content: bytes
    """Of an answer; images are not kept."""


def is_system_file(name: str) -> bool:
    """Tell whether an operating system or tar adds such a file to those of a person: macOS writes
    the attributes of FILE as `._FILE`, pax headers may lie unpacked in a folder."""
    return bool(_SYSTEM_FILE.search(name))


def read_lines(path: Path, expected: str) -> tuple[str, ...]:
    """The lines of a text file, each of which counts. Raises InputError: missing, or one empty."""
    try:
        lines = tuple(line.strip() for line in read_text(path).split("\n"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: expected {expected}") from None
    except (OSError, UnicodeDecodeError) as error:
        why = shorten_error(error)
        raise InputError(f"{path} cannot be read ({why}): expected {expected}") from None
    # A trailing blank line is a text file's end; one inside would shift every label after it.
    while lines and not lines[-1]:
        lines = lines[:-1]
    if not lines or not all(lines):
        raise InputError(f"{path} is empty or has an empty line: expected {expected}")
    return lines


def find_tars(folder: Path, split: str = SPLIT) -> list[Path]:
    """The tars of a part of a set, in order. Raises InputError: no set there, or a tar missing."""
    count_file = folder / split / SHARDS
    try:
        count = int(read_text(count_file))
    except OSError:
        raise InputError(
            f"{folder} is not an evaluation set: {count_file} is missing (expected the published "
            "webdataset layout, test/nshards.txt beside test/0.tar)"
        ) from None
    except ValueError:
        raise InputError(f"{count_file} must hold one number, the number of tars") from None
    tars: list[Path] = []
    for number in range(count):  # which may be anything: look for each tar before the list grows
        tars.append(folder / split / f"{number}.tar")
        if not tars[-1].is_file():
            raise InputError(f"{tars[-1]} is missing: {count_file} says there are {count} tars")
    return tars


def read_members(tar: Path, digest_images: bool = False) -> dict[str, dict[str, TarMember]]:
    """Key -> extension -> member, in tar order; what macOS and pax add is passed over. Raises
    InputError: the file is cut short or not a tar, a member occurs twice, an answer is larger than
    16 MiB."""
    found: dict[str, dict[str, TarMember]] = {}
    total = tar.stat().st_size
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                if not member.isfile() or is_system_file(member.name):
                    continue
                if member.offset_data + member.size > total:
                    raise tarfile.ReadError("unexpected end of data")
                folder, _, base = member.name.removeprefix("./").rpartition("/")
                stem, _, extension = base.partition(".")
                key, extension = f"{folder}/{stem}" if folder else stem, extension.lower()
                members = found.setdefault(key, {})
                if extension in members:
                    raise InputError(f"{tar}: member {member.name} occurs twice")
                span = Span(tar, member.offset_data, member.size)
                if extension in IMAGE_EXTENSIONS:
                    digest = hashlib.sha256(span.read()).hexdigest() if digest_images else ""
                    members[extension] = TarMember(span, digest, b"")
                    continue
                if member.size > _ANSWER_BYTES:
                    raise InputError(
                        f"{tar}: member {member.name} has {member.size:,} bytes, more than the "
                        f"{_ANSWER_BYTES:,} an answer may have"
                    )
                members[extension] = TarMember(span, "", span.read())
    except tarfile.TarError as error:
        raise InputError(
            f"{tar} cannot be read as a tar ({error}): fetch it again, it may be incomplete"
        ) from None
    return found


def find_image(members: dict[str, TarMember], where: str) -> TarMember:
    """The one image of a sample. Raises InputError: it has none, or several."""
    images = [member for extension, member in members.items() if extension in IMAGE_EXTENSIONS]
    if len(images) != 1:
        raise InputError(f"{where} has {len(images)} images, expected one")
    return images[0]


def read_label(content: bytes, where: str) -> int:
    """The class number of a `.cls` member. Raises InputError: none of at most nine digits."""
    text = content.decode("utf-8", "replace").strip()
    if not (text.isascii() and text.isdecimal() and len(text) <= _LABEL_DIGITS):
        raise InputError(f"{where}.cls must hold a class number, got {text[:20]!r}")
    return int(text)
