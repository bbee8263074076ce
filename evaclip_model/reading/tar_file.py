"""Places of the members of a tar, found from its headers alone: uncompressed ustar, PAX and GNU
tars, as webdataset and img2dataset write them. Compressed or sparse ones are refused.

Python's tarfile makes a dozen objects a member and reads every byte. Here a header is one read of a
few kilobytes, and what is not wanted is not read; who wants everything has it in long stretches.
"""

import os
import zlib
from collections.abc import Iterator
from typing import NamedTuple

_BLOCK = 512
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Links, devices, folders: nothing lies behind their headers, whatever size those give."""
_AT_ONCE = 8192
STRETCH = 1 << 20
"""Bytes of a stretch: a dozen images, and a member that does not fit is read by itself."""
_LONGEST_NAME = 1 << 20
"""Bytes of an extra header: a name, and on a Mac the file's attributes."""
_LONGEST_NUMBER = 20
_ADLER = 65521
_PACKED = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "bzip2": b"BZh", "xz": b"\xfd7zXZ"}
"""How a tar begins that its name does not say to be compressed."""


class BrokenTar(ValueError):
    """No tar, or one that cannot be read to its end; the message says where and why."""


class Member(NamedTuple):
    """A regular file inside a tar."""

    name: str
    offset: int
    """Of its first byte, from the beginning of the tar."""
    size: int
    content: memoryview | None = None
    """Its bytes, if they came along with its header."""

    def read(self, tar: int) -> bytes:
        """Its content, from the open tar's file descriptor; raises BrokenTar if that ends in it."""
        return bytes(self.view_content(tar))

    def view_content(self, tar: int) -> bytes | memoryview:
        """Its content as `read` gives it, not copied where it came along."""
        return _read_range(tar, self.offset, self.size) if self.content is None else self.content


class TarReader:
    """The regular files of a tar, in stored order, from its file descriptor. `stretch_bytes` of
    headers and contents are read at once, 0 while only headers are wanted; it may be changed
    between two members."""

    def __init__(self, tar: int) -> None:
        self._tar = tar
        self.stretch_bytes = 0

    def _read_from(self, offset: int) -> memoryview:
        return memoryview(os.pread(self._tar, self.stretch_bytes or _AT_ONCE, offset))

    def __iter__(self) -> Iterator[Member]:
        """Yield all members; raises BrokenTar for a wrong header, or an end inside a member."""
        size_of_tar = os.fstat(self._tar).st_size
        offset, extended = 0, _NOTHING
        near, around = memoryview(b""), 0  # the bytes from `around` on
        while True:
            at = offset - around
            if not 0 <= at <= len(near) - _BLOCK:
                near, around, at = self._read_from(offset), offset, 0
            header = bytes(near[at : at + _BLOCK])
            if not header:
                return
            if len(header) < _BLOCK:
                raise BrokenTar(f"it ends inside the header at byte {offset}")
            if not header.strip(b"\0"):
                return
            if not _is_header(header):
                packed = next((n for n, magic in _PACKED.items() if header.startswith(magic)), "")
                said = f"it is compressed by {packed}: unpack it" if packed and not offset else ""
                raise BrokenTar(said or f"there is no header at byte {offset}")
            kind = header[156:157]
            known = extended.size
            size = _parse_number(header[124:136], offset) if known is None else known
            if kind in _WITHOUT_CONTENT:
                size = 0
            content = offset + _BLOCK
            behind = content + (size + _BLOCK - 1) // _BLOCK * _BLOCK
            if behind > size_of_tar:
                raise BrokenTar(f"it ends inside the member at byte {offset}")
            room = max(0, self.stretch_bytes - _BLOCK)
            if at and len(near) - at - _BLOCK < size <= room:
                near, around, at = self._read_from(offset), offset, 0
            start, stop = at + _BLOCK, at + _BLOCK + size
            here = near[start:stop] if stop <= len(near) else None
            if kind in (b"x", b"L"):
                if size > _LONGEST_NAME:
                    raise BrokenTar(f"the header at byte {offset} claims a name of {size} bytes")
                body = _read_range(self._tar, content, size) if here is None else bytes(here)
                extended = _apply_extension(extended, kind, body)
            else:
                if kind in _REGULAR:
                    yield Member(extended.name or _parse_name(header), content, size, here)
                elif kind == b"S":
                    raise BrokenTar(f"the member at byte {offset} is sparse: pack it without holes")
                if kind != b"K":  # a long link's name stands between a long name and its member
                    extended = _NOTHING
            offset = behind


class _Extended(NamedTuple):
    """Content of extra headers about the member behind them."""

    name: str | None = None
    size: int | None = None


_NOTHING = _Extended()


def _apply_extension(before: _Extended, kind: bytes, content: bytes) -> _Extended:
    """All that is known after one more extra header; of two names the later one counts."""
    if kind == b"L":
        return before._replace(name=_decode_name(content.split(b"\0", 1)[0]))
    if not any(key in content for key in (b" path=", b" size=", b" GNU.sparse")):
        return before  # times and owners, as nearly always
    # PAX: "LENGTH key=value\n", again and again
    found: dict[bytes, bytes] = {}
    while content:
        length, _, rest = content.partition(b" ")
        if not _is_size(length) or not len(length) < int(length) <= len(content):
            raise BrokenTar("an extended header holds no key and value")
        key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        found[key] = value
        content = content[int(length) :]
    if any(key.startswith(b"GNU.sparse") for key in found):
        raise BrokenTar("it holds a sparse member: pack it without holes")
    name, size = found.get(b"path"), found.get(b"size", b"")
    if size and not _is_size(size):
        raise BrokenTar("an extended header gives a size that is not a number")
    return _Extended(
        _decode_name(name.rstrip(b"/")) if name else before.name, int(size) if size else before.size
    )


def _is_size(text: bytes) -> bool:
    return text.isdigit() and len(text) <= _LONGEST_NUMBER


def _read_range(tar: int, offset: int, size: int) -> bytes:
    content = os.pread(tar, size, offset)
    while len(content) < size:  # a read may be cut short, by a signal or at 2 GB
        more = os.pread(tar, size - len(content), offset + len(content))
        if not more:
            raise BrokenTar(f"it ends inside the member at byte {offset}")
        content += more
    return content


def _is_header(header: bytes) -> bool:
    """Return whether the sum in a header is that of its bytes, the sum's own counted as spaces."""
    field = header[148:156]
    try:
        stored = int(field.strip(b" \0"), 8)
    except ValueError:
        return False
    # Adler-32 begins with the sum of all bytes, plus one: a tenth of the time of adding them here
    added = (zlib.adler32(header) & 0xFFFF) - 1 - sum(field) + 8 * 32
    return (stored - added) % _ADLER == 0


def _parse_number(field: bytes, offset: int) -> int:
    """An octal number, or, with the first bit set, a binary one."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        raise BrokenTar(f"there is no header at byte {offset}") from None


def _parse_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return _decode_name(name)


def _decode_name(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
