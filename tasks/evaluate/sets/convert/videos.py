"""The centre frame of every video, as an evaluation set of images (paper, Table 3).

The centre is frame number n // 2 of the n that were decoded, from the first to the last: what a
file says of its own length is often wrong, and seeking in it gives neighbours of the frame asked
for.
"""

import importlib
import itertools
import re
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from evaclip_model.errors import InputError, shorten_error
from evaclip_model.reading.urls import read_text
from tasks.evaluate.sets.convert import source_images as source
from tasks.evaluate.sets.convert.label_table import LabelTable, read_rows
from tasks.evaluate.sets.convert.shard_writer import Found, Source, UnusableSourceError, encode_png

SUFFIXES = frozenset((".avi", ".mp4", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".flv"))

_UCF_FILE = re.compile(r"v_([A-Za-z]+)_g\d+_c\d+$")
_WHOLE = 0.95
"""Share of the promised seconds from which a video counts as whole; sound may last longer."""
_LOOSE = "lies in no folder of a class"
_RANGE = re.compile(r"_\d{6}_\d{6}$")
_BEFORE_CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")


def find_videos(root: Path, listing: Path | None = None) -> LabelTable:
    """The videos below `root`, by path, or those of a list, with their classes. Raises InputError:
    no video is found, the list is of another form, or two files could be meant.

    Without a list, and with one that has no classes, the folders of `root` are the classes. A list
    with classes decides them, wherever the files lie below `root`: UCF-101's form, `CLASS/FILE` or
    `FILE` a line; or Kinetics', a .csv with the columns youtube_id, time_start and time_end, and
    best label, whose files are called `ID_START_END.mp4` with six digits each, or `ID.mp4`.

    UCF-101's classes are written in one word, and best in its files' names ("HandStandPushups" in
    the folder "HandstandPushups"): every capital begins a word.
    """
    if not root.is_dir():
        raise InputError(f"{root} is not a folder: expected a folder of videos")
    everything = list(source.walk_files(root))
    videos = [path for path in everything if path.suffix.lower() in SUFFIXES]
    has_folders = any(path.is_dir() and path.name[0] != "." for path in root.iterdir())
    if not videos:
        raise InputError(f"{root} has no video in its folders")
    if listing is None and not has_folders:
        raise InputError(
            f"{root} has no folder in it: expected one a class, or --list with the class of each "
            "video"
        )
    wanted = _wanted_names(listing) if listing else []
    from_list = bool(wanted) and all(word for _, word in wanted)
    classes = (
        [] if from_list and not has_folders else [one.name for one in source.class_folders(root)]
    )
    if from_list and not {word for _, word in wanted} <= {*classes}:
        classes = sorted({word for _, word in wanted})
    found = [(path, _folder_of(path, root)) for path in videos if path.parent != root]
    spoken = [(path.stem, word) for path, word in found]
    missing: list[tuple[str, str]] = []
    if listing is None:
        for path in everything:
            if path.suffix.lower() not in SUFFIXES:
                missing.append((str(path), f"is not a video ({path.suffix or 'no suffix'})"))
            elif path.parent == root:
                missing.append((str(path), _LOOSE))
    else:
        found, by_stem = [], source.group_by_stem(videos)
        for stem, word in dict.fromkeys(wanted):
            paths = by_stem.get(stem) or by_stem.get(_RANGE.sub("", stem), [])
            paths = [path for path in paths if _folder_of(path, root) == word] or paths
            if len(paths) > 1:
                raise InputError(
                    f"{listing}: '{stem}' could be {paths[0]} or {paths[1]}: remove one"
                )
            spoken.append((paths[0].stem if paths else stem, word))
            if not paths:
                missing.append((stem, "is in the list and not in the folders"))
            elif not word and paths[0].parent == root:
                missing.append((str(paths[0]), _LOOSE))
            else:
                found.append((paths[0], word or _folder_of(paths[0], root)))
    if not found:
        raise InputError(f"{root} has none of the videos of {listing or 'its folders'}")
    images = [
        Source(str(path), partial(_read_frame, path), source.stamp_of(path), (word,))
        for path, word in found
    ]
    images += [Source(name, partial(_fail_with, why)) for name, why in missing]
    # The first file of a class that is called as UCF-101's are says how the class is spoken.
    known = [(_UCF_FILE.match(stem), word) for stem, word in sorted(spoken, reverse=True)]
    names = {word: _BEFORE_CAPITAL.sub(" ", match[1]) for match, word in known if match}
    return LabelTable(images, classes, display_names=names)


def _folder_of(path: Path, root: Path) -> str:
    return path.relative_to(root).parts[0]


def _read_frame(path: Path) -> Found:
    image, remark = centre_frame(path)
    return Found(encode_png(image), "png", remark=remark)


def _fail_with(reason: str) -> Found:
    raise UnusableSourceError(reason)


def centre_frame(path: Path) -> tuple[Image.Image, str]:
    """Decoded frame n // 2 of the n in the first video stream, as RGB, and a remark, empty as a
    rule, that the file promises more than it has. Raises UnusableSourceError: it cannot be decoded
    to its end, or has no frame; InputError: PyAV is not installed."""
    try:
        av: Any = importlib.import_module("av")
    except ImportError:
        raise InputError(
            "videos are read with PyAV, which is not installed: pip install 'evaclip[video]'"
        ) from None
    try:
        count, remark = _count_frames(av, path)
        # A second pass: all frames of a long video at once would not fit into memory.
        with av.open(str(path)) as container:
            frame = next(itertools.islice(container.decode(video=0), count // 2, None))
            return frame.to_image(), remark
    except av.FFmpegError as error:
        raise UnusableSourceError(f"cannot be decoded: {error.strerror}") from None
    except StopIteration:
        raise UnusableSourceError("gave fewer frames when it was read again") from None


def _count_frames(av: Any, path: Path) -> tuple[int, str]:
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


def _wanted_names(listing: Path) -> list[tuple[str, str]]:
    """(name of a file without its suffix, word of its class or "") of every line of a list."""
    expected = "expected CLASS/FILE a line, or a .csv with youtube_id, time_start and time_end"
    if listing.suffix.lower() in (".csv", ".tsv"):
        found = []
        for where, row in read_rows(listing)[1]:
            try:
                start, end = (int(float(row[key])) for key in ("time_start", "time_end"))
                stem = f"{row['youtube_id']}_{start:06d}_{end:06d}"
            except (KeyError, ValueError, OverflowError):
                raise InputError(f"{where} is not of a list of videos: {expected}") from None
            found.append((stem, row.get("label", "")))
        return found
    try:
        lines = [line.strip() for line in read_text(listing).split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        why = shorten_error(error)
        raise InputError(f"{listing} cannot be read ({why}): {expected}") from None
    # A label may follow the name, as in UCF-101's lists for training.
    paths = [Path(re.sub(r"\s+\d+$", "", line)) for line in lines if line]
    return [(path.stem, path.parent.name) for path in paths]
