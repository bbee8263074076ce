"""The verdicts of a verification on its shards: the file between the stages verify and dataset.

Covers: the verdict on a shard, the file that holds all of them.
Not here: reaching a verdict (tasks/verify), choosing samples (tasks/dataset).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from evaclip_model.config import Config
from evaclip_model.files import write_atomically
from evaclip_model.reading.samples import Shard
from evaclip_model.reading.urls import is_url

CHECKED = "checked.json"
"""In the folder of the verification."""


class ShardVerdict(Config):
    """The verdict on one shard."""

    path: str
    """Of the tar, relative to the verification's folder; or its URL."""
    stored: int
    """Samples that could be read, bad ones included: its rows in the index."""
    shard: Shard | None
    """All its samples, none left out yet; None if it must not be read."""
    flaws: dict[str, int]
    """Bad samples by reason; each counts once."""
    left_out: str | None
    """The reason why the shard is left out; None if it is used."""


def write_verdicts(verdicts: Sequence[ShardVerdict], folder: Path) -> None:
    """Write the verdicts on all shards, in the order of their numbers in the index."""
    lines = ",\n".join(verdict.model_dump_json() for verdict in verdicts)
    write_atomically(folder / CHECKED, f"[\n{lines}\n]\n")


def read_verdicts(folder: Path) -> list[ShardVerdict]:
    """The verdicts of a finished verification, by shard number."""
    path = folder / CHECKED
    return [ShardVerdict.from_mapping(one, where=str(path)) for one in json.loads(path.read_text())]


def relative_path(location: Path | str, folder: Path) -> str:
    """A shard's name in a file of `folder`: a URL as it is, a path relative to the folder."""
    return str(location) if is_url(location) else os.path.relpath(location, folder)


def shard_location(folder: Path, path: str) -> str:
    """The place of a shard that a file of `folder` names so."""
    return path if is_url(path) else str(folder / path)
