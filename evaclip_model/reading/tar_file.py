"""Where the members of a tar lie, found from its headers alone.

Covers: uncompressed ustar, PAX and GNU tars, as webdataset and img2dataset write them.
Not here: what the members mean (samples.py); compressed or sparse tars; making tars.

webdataset's own reading goes through Python's tarfile: a dozen objects a member, and every byte of
members that nobody asked for. Here a header is one read of 512 bytes, and what is not wanted is
never read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

_BLOCK = 512
_REGULAR = (b"0", b"\0", b"7")
_AT_ONCE = 4096
_LONGEST_NAME = 1 << 16


class BrokenTar(ValueError):
    """No tar, or one that ends too early; the message says where."""


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file inside a tar."""

    name: str
    offset: int
    """Of its first byte, from the beginning of the tar."""
    size: int

    def read(self, tar: int) -> bytes:
        """Its content, from the open tar's file descriptor.

        Raises:
            BrokenTar: the tar ends inside it.
        """
        return _read(tar, self.offset, self.size)


def members(tar: int) -> Iterator[Member]:
    """The regular files of a tar, in stored order, from its file descriptor.

    Raises:
        BrokenTar: a header that is none, or a tar that ends inside a member.
    """
    size_of_tar = os.fstat(tar).st_size
    offset, extended = 0, _Extended()
    near, around = b"", 0  # the bytes from `around` on: small members lie between their headers
    while True:
        if not around <= offset <= around + len(near) - _BLOCK:
            near, around = os.pread(tar, _AT_ONCE, offset), offset
        header = near[offset - around : offset - around + _BLOCK]
        if not header:
            return
        if len(header) < _BLOCK:
            raise BrokenTar(f"it ends inside the header at byte {offset}")
        if not header.strip(b"\0"):
            return
        size = extended.size if extended.size is not None else _number(header[124:136], offset)
        if not _is_header(header):
            raise BrokenTar(f"there is no header at byte {offset}")
        content = offset + _BLOCK
        behind = content + (size + _BLOCK - 1) // _BLOCK * _BLOCK
        if behind > size_of_tar:
            raise BrokenTar(f"it ends inside the member at byte {offset}")
        kind = header[156:157]
        if kind in (b"x", b"L"):
            if size > _LONGEST_NAME:
                raise BrokenTar(f"the header at byte {offset} claims a name of {size} bytes")
            extended = _Extended.of(kind, _read(tar, content, size))
        else:
            if kind in _REGULAR:
                yield Member(extended.name or _name(header), content, size)
            extended = _Extended()
        offset = behind


@dataclass(frozen=True)
class _Extended:
    """What an extra header says about the member behind it."""

    name: str | None = None
    size: int | None = None

    @classmethod
    def of(cls, kind: bytes, content: bytes) -> _Extended:
        if kind == b"L":
            return cls(name=_text(content.rstrip(b"\0")))
        # PAX: "LENGTH key=value\n", again and again
        found: dict[bytes, bytes] = {}
        while content:
            length, _, rest = content.partition(b" ")
            if not length.isdigit() or not len(length) < int(length) <= len(content):
                raise BrokenTar("an extended header holds no key and value")
            key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
            found[key] = value
            content = content[int(length) :]
        size = found.get(b"size")
        name = found.get(b"path")
        return cls(_text(name) if name else None, int(size) if size else None)


def _read(tar: int, offset: int, size: int) -> bytes:
    content = os.pread(tar, size, offset)
    while len(content) < size:  # a read may be cut short, by a signal or at 2 GB
        more = os.pread(tar, size - len(content), offset + len(content))
        if not more:
            raise BrokenTar(f"it ends inside the member at byte {offset}")
        content += more
    return content


def _is_header(header: bytes) -> bool:
    """Whether the sum in a header is that of its bytes, the sum's own counted as spaces."""
    stored = header[148:156].strip(b" \0")
    try:
        return int(stored, 8) == sum(header) - sum(header[148:156]) + 8 * 32
    except ValueError:
        return False


def _number(field: bytes, offset: int) -> int:
    """An octal number, or, with the first bit set, a binary one."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        raise BrokenTar(f"there is no header at byte {offset}") from None


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return _text(name)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
