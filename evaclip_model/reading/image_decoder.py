"""The one place where bytes from strangers become pixels. What part of an image is taken and how it
is resized is transform.py's.

Limits are checked in the header before anything is decoded; a clock stops what a header cannot
tell. Only the first frame is decoded. No format is opened for which Pillow starts a program (EPS).

An image is turned as its EXIF orientation says. 16 bits a channel become 8 by their high byte;
pixels of 32 bits, whose range no header states, are refused. Everything else keeps its mode.
"""

import io
import re
import struct
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.Image import Transpose

MAX_PIXELS = 64_000_000
"""Largest width x height that is decoded: a small file can claim a huge picture."""
MAX_BYTES = 2**28
MAX_SCANNED_PIXELS = 2_000_000_000
"""Largest scans x pixels of a JPEG: every scan visits all blocks again, however few bytes it has.
About a second of libjpeg's time for scans without content; encoders make about ten."""
_LEAST_SCANNED = 40_000
"""Pixels whose time a scan of an image without any would take."""
_LEAST_SCAN_BYTES = 10
MAX_TIFF_STRIPS = 65_536
"""Pillow makes a Python object for every strip or tile while it reads the header."""
MAX_DECODE_CPU_S = 10.0
"""CPU seconds for one image; honest ones of `MAX_PIXELS` take up to three."""

MAGIC_BYTES = 12
"""Bytes of a file that `identify_format` needs."""
_MAGIC = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "WEBP": (b"RIFF",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "BMP": (b"BM",),
    "TIFF": (b"II*\0", b"MM\0*"),
    "PPM": (b"P4", b"P5", b"P6"),
}
"""Pillow's name of a format -> first bytes: all that is ever opened."""
_TIFF_COMPRESSIONS = (1, 2, 3, 4, 5, 8, 32773, 32946)
"""None, CCITT, LZW, deflate, PackBits; not JPEG, whose scans nobody would have counted."""
_TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the image upright."""
_JPEG_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")
_END_OF_IMAGE, _START_OF_SCAN, _APP1 = 0xD9, 0xDA, 0xE1
_EXIF = b"Exif\0\0"
_JPEG_DAMAGE = ("Corrupt JPEG data", "Premature end")
"""How libjpeg's warnings about lost content begin; its others are about odd headers."""


class UnreadableImageError(ValueError):
    """These bytes are not an image that can be used; one bad sample, not a failure of the run."""

    word = "undecodable"
    """What tables and counts say of such a sample."""


class TooManyPixelsError(UnreadableImageError):
    """The image is larger than the caller's limit."""

    word = "too_many_pixels"


class TooCostlyImageError(UnreadableImageError):
    """Decoding would take, or took, more CPU time than an honest image of that size needs."""

    word = "too_costly"


class DamagedImageError(UnreadableImageError):
    """The decoder filled gaps in damaged content by guesses."""

    word = "damaged"


@dataclass(frozen=True)
class DecodedImage:
    """The first frame of a file."""

    image: Image.Image
    """Upright, 8 bits a channel, otherwise in its own mode."""
    format: str
    is_changed: bool
    """Whether it was turned or lost bits: who decodes the file otherwise sees another image."""


def decode_image(data: bytes | memoryview, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the first frame of a JPEG, PNG, WebP, GIF, BMP, TIFF or PPM file: the upright image, 8
    bits a channel, otherwise in its own mode. Raises UnreadableImageError: truncated, of another
    format, or beyond `max_pixels` or another limit above; the subclass says which."""
    return _guarded(_decode_by_pillow, bytes(data), max_pixels).image


def decode_undamaged_image(data: bytes | memoryview, max_pixels: int = MAX_PIXELS) -> DecodedImage:
    """Decode as `decode_image`; a JPEG in which libjpeg had to guess raises DamagedImageError."""
    return _guarded(_decode_strictly, bytes(data), max_pixels)


def identify_format(data: bytes | memoryview) -> str | None:
    """Pillow's name of the format that the first bytes announce, if it is one that is opened."""
    start = bytes(data[:MAGIC_BYTES])
    found = next((name for name, magic in _MAGIC.items() if start.startswith(magic)), None)
    return None if found == "WEBP" and start[8:] != b"WEBP" else found


def read_jpeg_orientation(data: bytes) -> int:
    """The EXIF orientation of a JPEG, 1 to 8; 1 (upright) where it has none."""
    for marker, start, stop in _jpeg_segments(data):
        if marker == _START_OF_SCAN:
            break
        if marker == _APP1 and data.startswith(_EXIF, start):
            return _orientation_in(data[start + len(_EXIF) : stop])
    return 1


def require_decodable_jpeg(data: bytes, width: int, height: int, max_pixels: int) -> None:
    """Raises TooManyPixelsError, or TooCostlyImageError: too many scans for a JPEG of that size."""
    _require_pixels(width, height, max_pixels)
    most = MAX_SCANNED_PIXELS // max(_LEAST_SCANNED, width * height)
    # A count of the marker's bytes can only be too large (an embedded thumbnail has some, too).
    if len(data) < most * _LEAST_SCAN_BYTES or data.count(b"\xff\xda") <= most:
        return
    scans = sum(marker == _START_OF_SCAN for marker, _, _ in _jpeg_segments(data))
    if scans > most:
        raise TooCostlyImageError(f"{scans} scans of {width} x {height} pixels, more than {most}")


def _guarded(
    decode: Callable[[bytes, int], DecodedImage], data: bytes, max_pixels: int
) -> DecodedImage:
    """Call `decode`; everything that hostile bytes make it raise becomes one kind of error."""
    if len(data) > MAX_BYTES:
        raise TooCostlyImageError(f"{len(data):,} bytes, more than {MAX_BYTES:,}")
    try:
        with warnings.catch_warnings():
            # Pillow warns of large images and odd metadata; the limits here decide
            warnings.simplefilter("ignore")
            return decode(data, max_pixels)
    except UnreadableImageError:
        raise
    except Image.DecompressionBombError as error:  # Pillow looks before we can
        raise TooManyPixelsError(str(error)) from None
    except UnidentifiedImageError:
        # Pillow's own words have the address of an object in memory, different in every run.
        raise UnreadableImageError("the header is not that of its format") from None
    except Exception as error:  # Pillow's decoders raise whatever their parsers meet
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error


def _decode_by_pillow(data: bytes, max_pixels: int) -> DecodedImage:
    file_format = identify_format(data)
    if file_format is None:
        raise UnreadableImageError("these bytes are not an image of a known format")
    if file_format == "TIFF":
        _require_plain_tiff(data)
    image: Image.Image = Image.open(_ClockedFile(data), formats=(file_format,))
    _require_pixels(*image.size, max_pixels)
    orientation = 1  # of a TIFF, too: Pillow itself turns it while it loads it
    if file_format == "JPEG":
        require_decodable_jpeg(data, *image.size, max_pixels)
        orientation = read_jpeg_orientation(data)
    elif file_format != "TIFF":
        orientation = _orientation_in(image.info.get("exif", b"").removeprefix(_EXIF))
    image.load()
    is_deep = file_format == "PNG" and data[24] == 16  # bits a channel
    return _turn_upright(_with_eight_bits(image, file_format), file_format, orientation, is_deep)


def _decode_strictly(data: bytes, max_pixels: int) -> DecodedImage:
    if identify_format(data) != "JPEG":
        return _decode_by_pillow(data, max_pixels)
    import simplejpeg  # not where a model is served, which needs `decode_image` alone

    height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    require_decodable_jpeg(data, width, height, max_pixels)
    wanted = {"Gray": "GRAY", "YCbCr": "RGB", "RGB": "RGB"}.get(space, "CMYK")
    try:
        pixels = simplejpeg.decode_jpeg(data, wanted)
    except ValueError as error:
        decoded = _decode_by_pillow(data, max_pixels)  # refuses what is cut short
        if str(error).startswith(_JPEG_DAMAGE):
            raise DamagedImageError(str(error)) from None
        return decoded
    if wanted == "CMYK":  # the values are inverted or not, as Pillow knows
        return _decode_by_pillow(data, max_pixels)
    image = Image.fromarray(pixels[:, :, 0] if wanted == "GRAY" else pixels)
    return _turn_upright(image, "JPEG", read_jpeg_orientation(data))


def _turn_upright(
    image: Image.Image, file_format: str, orientation: int, is_deep: bool = False
) -> DecodedImage:
    turn = _TURNS.get(orientation)
    upright = image if turn is None else image.transpose(turn)
    return DecodedImage(upright, file_format, is_deep or turn is not None)


def _require_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise TooManyPixelsError(f"{width} x {height} pixels, more than {max_pixels:,}")


def _require_plain_tiff(data: bytes) -> None:
    """Refuse a TIFF whose directory alone would cost too much, or that hides another format."""
    for tag, count, value in _tiff_entries(data):
        if tag in (273, 279, 324, 325) and count > MAX_TIFF_STRIPS:  # their places and lengths
            raise TooCostlyImageError(f"{count:,} strips, more than {MAX_TIFF_STRIPS:,}")
        if tag == 259 and value not in _TIFF_COMPRESSIONS:
            raise UnreadableImageError(f"TIFF compression {value} is not read")


class _ClockedFile(io.BytesIO):
    """A file in memory that stops its reader after `MAX_DECODE_CPU_S` of the thread's CPU time:
    Pillow reads headers, chunks and 64 KB of content at a time through Python."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._end_s = time.thread_time() + MAX_DECODE_CPU_S

    def read(self, size: int | None = -1, /) -> bytes:
        if time.thread_time() > self._end_s:
            raise TooCostlyImageError(f"decoding takes more than {MAX_DECODE_CPU_S:g} CPU seconds")
        return super().read(size)


def _with_eight_bits(image: Image.Image, file_format: str) -> Image.Image:
    # Pillow's conversion to RGB would clip deep grey to white. Older versions open it as "I".
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format == "PNG"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UnreadableImageError("pixels of 32 bits, whose range is not known")
    return image


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and stop of the content of every segment up to the end of the image; compressed
    data are passed over as libjpeg does."""
    at = 2
    while found := _JPEG_MARKER.search(data, at):
        marker, start = found[0][-1], found.end()
        if marker == _END_OF_IMAGE or start + 2 > len(data):
            return
        at = start + max(2, int.from_bytes(data[start : start + 2], "big"))
        yield marker, start + 2, at


def _orientation_in(exif: bytes) -> int:
    """The orientation in an EXIF block, 1 to 8; 1 where it says nothing that can be understood."""
    if not exif.startswith((b"II", b"MM")):
        return 1
    try:
        found = next((value for tag, _, value in _tiff_entries(exif) if tag == 0x0112), 1)
    except struct.error:  # the block is cut short
        return 1
    return found if found in _TURNS else 1


def _tiff_entries(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Tag, count and value, as a 16-bit number, of the entries of a TIFF's first directory."""
    order = "<" if data.startswith(b"II") else ">"
    (directory,) = struct.unpack_from(f"{order}I", data, 4)
    (entries,) = struct.unpack_from(f"{order}H", data, directory)
    for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
        tag, _, count, value = struct.unpack_from(f"{order}HHIH", data, entry)
        yield tag, count, value
