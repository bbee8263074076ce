"""Images that cost more than they look: made here, so that no such file lies in the repository."""

from __future__ import annotations

import struct


def jpeg_of_many_scans(side: int, scans: int) -> bytes:
    """A grey progressive JPEG, all zero, whose frequencies are refined `scans` times."""
    blocks = ((side + 7) // 8) ** 2
    runs, left = "", blocks
    while left:  # end-of-band runs over all blocks
        count = min(left, 32767)
        power = count.bit_length() - 1
        runs += format(power, "04b") + (format(count - (1 << power), f"0{power}b") if power else "")
        left -= count
    head = b"\xff\xd8" + _segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0")
    head += _segment(0xDB, b"\0" + b"\1" * 64)
    head += _segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + bytes([1, 0x11, 0]))
    head += _huffman_table(0, [(1, 0)])
    head += _huffman_table(1, [(4, power << 4) for power in range(15)])
    body = _segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + _packed("0" * blocks)
    body += _segment(0xDA, bytes([1, 1, 0, 1, 63, 0x01])) + _packed(runs)
    body += (_segment(0xDA, bytes([1, 1, 0, 1, 63, 0x10])) + _packed(runs)) * scans
    return head + body + b"\xff\xd9"


def gif_of_empty_blocks(blocks: int) -> bytes:
    """A GIF whose first frame comes behind that many extension blocks of one byte."""
    head = b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0x80, 0, 0) + bytes(6)
    return head + b"\x21\xfe" + b"\1a" * blocks + b"\0" + b";"


def _segment(marker: int, content: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content


def _huffman_table(kind: int, symbols: list[tuple[int, int]]) -> bytes:
    counts = [0] * 16
    for length, _ in symbols:
        counts[length - 1] += 1
    listed = bytes(counts) + bytes(symbol for _, symbol in symbols)
    return _segment(0xC4, bytes([kind << 4]) + listed)


def _packed(bits: str) -> bytes:
    bits += "1" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")
