"""Images with captions, as Karpathy's split files list them, as a retrieval set.

Covers: dataset_coco.json and dataset_flickr30k.json, and files of that form.
Not here: writing the set (write.py).

All captions of an image are kept: COCO's 5,000 test images have 25,010.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from evaclip_model.errors import InputError
from tasks.evaluate.sets.convert.shard_writer import Found, Source, image_file

_FORM = (
    'expected {"images": [{"filename": ..., "split": ..., "sentences": [{"raw": ...}, ...]}, ...]}'
)


def captioned_sources(listing: Path, images: Path, split: str = "test") -> list[Source]:
    """The images of one split, in the order of the file, each with its captions.

    Args:
        listing: JSON file of Karpathy's form.
        images: folder that its `filepath`, where it has one, and `filename` lie in.

    Raises:
        InputError: the file is missing or of another form, or has nothing in this split.
    """
    try:
        entries = json.loads(listing.read_text(encoding="utf-8"))["images"]
        chosen = [entry for entry in entries if entry["split"] == split]
        found = [_source(entry, images) for entry in chosen]
    except FileNotFoundError:
        raise InputError(f"{listing} is missing") from None
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{listing} is not of the known form: {_FORM}") from None
    if not found:
        there = ", ".join(sorted({str(entry["split"]) for entry in entries})) or "none"
        raise InputError(f"{listing} has no image in the split '{split}'; there are: {there}")
    return found


def _source(entry: dict[str, Any], images: Path) -> Source:
    path = images / entry.get("filepath", "") / entry["filename"]
    captions = tuple(sentence["raw"].strip() for sentence in entry["sentences"])
    captions = tuple(caption for caption in captions if caption)
    if not captions:
        raise InputError(f"{entry['filename']} has no caption")
    return Source(str(path), partial(_read, path, captions))


def _read(path: Path, captions: tuple[str, ...]) -> Found:
    extension, content = image_file(path.read_bytes())
    return Found(content, extension, captions)
