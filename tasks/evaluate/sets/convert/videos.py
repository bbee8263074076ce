"""The centre frame of every video, as an evaluation set of images (paper, Table 3).

Covers: finding videos by class or by list, what the classes are called, decoding.
Not here: writing the set (write.py). PyAV is imported here alone.

The centre is frame number n // 2 of the n that were decoded, from the first to the last: what a
file says of its own length is often wrong, and seeking in it gives neighbours of the frame asked
for.
"""

from __future__ import annotations

import csv
import importlib
import itertools
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from evaclip_model.errors import InputError
from tasks.evaluate.sets.convert.shard_writer import Found, Source, UnusableSourceError, png

SUFFIXES = frozenset((".avi", ".mp4", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".flv"))

_UCF_FILE = re.compile(r"v_([A-Za-z]+)_g\d+_c\d+$")
_WHOLE = 0.95
"""Share of the promised seconds from which a video counts as whole; sound may last longer."""
_BEFORE_CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")


def video_names(folders: Sequence[Path]) -> tuple[str, ...]:
    """What the classes of these folders are called.

    UCF-101's are written in one word, and best in its files' names ("HandStandPushups" in the
    folder "HandstandPushups"): every capital begins a word. Others are the folders' names,
    underscores being spaces.
    """
    return tuple(_name(folder) for folder in folders)


def video_sources(folders: Sequence[Path], listing: Path | None = None) -> list[Source]:
    """The videos of every class, class by class, by path; only those of a list, where one is given.

    What a list names and the folders lack is a source that fails: it is counted, not passed over.

    Args:
        folders: one a class, in the order of their labels.
        listing: UCF-101's form, `CLASS/FILE` or `FILE` a line, or Kinetics', a .csv with the
            columns youtube_id, time_start and time_end, whose files are called
            `ID_START_END.mp4` with six digits each.

    Raises:
        InputError: there is no video, or the list is of another form.
    """
    found = {
        path: label
        for label, folder in enumerate(folders)
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES
    }
    if not found:
        raise InputError(f"{folders[0].parent} has no video in its folders")
    if listing is None:
        return [Source(str(path), partial(_read, path, label)) for path, label in found.items()]
    by_stem = {path.stem: path for path in found}
    wanted = dict.fromkeys(_wanted(listing))
    paths = {name: by_stem[name] for name in wanted if name in by_stem}
    here = [Source(str(path), partial(_read, path, found[path])) for path in paths.values()]
    gone = [Source(name, _absent) for name in wanted if name not in paths]
    return here + gone


def centre_frame(path: Path) -> tuple[Image.Image, str]:
    """Decoded frame n // 2 of the n in the first video stream, as RGB, and a remark.

    The remark, empty as a rule, says that a file promises more than it has: it may have been cut
    short.

    Raises:
        UnusableSourceError: it cannot be decoded to its end, or has no frame.
        InputError: PyAV is not installed.
    """
    av = _av()
    try:
        count, remark = _count(av, path)
        # A second pass: all frames of a long video at once would not fit into memory.
        with av.open(str(path)) as container:
            frame = next(itertools.islice(container.decode(video=0), count // 2, None))
            return frame.to_image(), remark
    except av.FFmpegError as error:
        raise UnusableSourceError(f"cannot be decoded: {error.strerror}") from None
    except StopIteration:
        raise UnusableSourceError("gave fewer frames when it was read again") from None


def _count(av: Any, path: Path) -> tuple[int, str]:
    """Frames of the first video stream, and what is odd about their number."""
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise UnusableSourceError("has no video stream")
        stream = container.streams.video[0]
        count, last = 0, 0.0
        for frame in container.decode(stream):
            count, last = count + 1, frame.time or last
        if not count:
            raise UnusableSourceError("has no frame")
        if stream.frames > count:
            return count, f"{count} of {stream.frames} promised frames"
        promised = (container.duration or 0) / av.time_base
        if last < _WHOLE * promised - 1:
            return count, f"{last:.1f} of {promised:.1f} promised seconds"
        return count, ""


def _read(path: Path, label: int) -> Found:
    image, remark = centre_frame(path)
    return Found(png(image), "png", label, remark)


def _name(folder: Path) -> str:
    names = sorted(match[1] for path in folder.iterdir() if (match := _UCF_FILE.match(path.stem)))
    if names:
        return _BEFORE_CAPITAL.sub(" ", names[0])
    return " ".join(folder.name.replace("_", " ").split())


def _wanted(listing: Path) -> Iterator[str]:
    """Names of the files of a list, without their suffixes."""
    try:
        with listing.open(encoding="utf-8", newline="") as file:
            if listing.suffix == ".csv":
                for row in csv.DictReader(file):
                    start, end = (int(float(row[key])) for key in ("time_start", "time_end"))
                    yield f"{row['youtube_id']}_{start:06d}_{end:06d}"
            else:
                for line in filter(None, map(str.strip, file)):
                    # A label may follow the name, as in UCF-101's lists for training.
                    yield Path(re.sub(r"\s+\d+$", "", line)).stem
    except FileNotFoundError:
        raise InputError(f"{listing} is missing: expected a list of videos") from None
    except (KeyError, ValueError, TypeError, UnicodeDecodeError):
        raise InputError(
            f"{listing} is no list of videos: expected CLASS/FILE a line, or a .csv with "
            "youtube_id, time_start and time_end"
        ) from None


def _absent() -> Found:
    raise UnusableSourceError("is in the list and not in the folders")


def _av() -> Any:
    try:
        return importlib.import_module("av")
    except ImportError:
        raise InputError(
            "videos are read with PyAV, which is not installed: pip install 'evaclip[video]'"
        ) from None
