"""The values that all units of a merge share: its files, its settings, and later its cut.

Covers: the plan as plain values, fit to be sent to a worker; the saved cut; making a folder once.
Not here: making the plan (survey_files.py), the units (units.py).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tasks.merge.config import MergeConfig, SidecarConfig

ROWS_PER_RANGE = 1_000_000


@dataclass(frozen=True)
class MetadataFile:
    """One input file: what to read of it, and how many rows it must give."""

    number: int
    """Place among all files of the merge."""
    path: str
    """The parquet file that is read: as published, or made from the published file."""
    source: int
    """Place of its source in the config."""
    columns: str
    """Select list that gives it the common columns."""
    sidecar_keys: tuple[str, ...]
    """SQL of its key for each sidecar of its source."""
    rows: int
    bad_lines: int = 0
    """Lines of the text file that it was made from that are no rows."""
    first_bad_line: str = ""
    """The first of them, as the user's own file has it, and what is wrong with it."""


@dataclass(frozen=True)
class Sidecar:
    """One sidecar of a source."""

    source: int
    place: int
    """Its place among the source's sidecars."""
    config: SidecarConfig
    paths: tuple[str, ...]
    keys: tuple[str, ...] = ()
    """SQL of the key in each of them."""


@dataclass(frozen=True)
class Edition:
    """A cleaned edition that old copies are compared with."""

    sources: tuple[int, ...]
    """Who is compared with it."""
    files: tuple[tuple[str, str], ...]
    """(path, name of its URL column)."""


@dataclass(frozen=True)
class MergePlan:
    """Everything the units share; nothing of it changes while they run."""

    config: MergeConfig
    out: Path
    files: tuple[MetadataFile, ...]
    sidecars: tuple[Sidecar, ...]
    editions: tuple[Edition, ...]
    partitions: int
    threads: int | None
    memory_limit: str
    """Memory of the database of one chunk."""
    given: tuple[str, ...] = ()
    """Files of rows that earlier merges selected: their addresses are not selected again."""

    @property
    def temporary(self) -> Path:
        return self.out / "_tmp"

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    @property
    def rows_per_range(self) -> int:
        """A multiple of the rows of a file, so that every file lies in one range."""
        return max(1, ROWS_PER_RANGE // self.config.rows_per_file) * self.config.rows_per_file

    @property
    def outside_paths(self) -> list[str]:
        sidecars = [path for sidecar in self.sidecars for path in sidecar.paths]
        editions = [path for edition in self.editions for path, _ in edition.files]
        return [file.path for file in self.files] + sidecars + editions + list(self.given)

    def of_source(self, source: int) -> list[MetadataFile]:
        return [file for file in self.files if file.source == source]

    def sidecars_of(self, source: int) -> list[tuple[int, Sidecar]]:
        return [(n, sidecar) for n, sidecar in enumerate(self.sidecars) if sidecar.source == source]

    def sidecar_key_files(self) -> list[tuple[int, MetadataFile]]:
        return [
            (number, file) for file in self.files for number, _ in self.sidecars_of(file.source)
        ]

    def sidecar_files(self) -> list[tuple[int, str, str]]:
        """(number of the sidecar, path, SQL of its key)."""
        return [
            (number, *file)
            for number, sidecar in enumerate(self.sidecars)
            for file in zip(sidecar.paths, sidecar.keys, strict=True)
        ]

    def known_key_files(self) -> list[tuple[int, str, str]]:
        """(number, path, name of its URL column): of editions, then of what was given before."""
        editions = [(n, *file) for n, edition in enumerate(self.editions) for file in edition.files]
        return editions + [(len(self.editions), path, "url") for path in self.given]

    def list_ranges(self) -> list[tuple[int, int]]:
        """(source, place of the range in it) of every range; only after the cut."""
        return [
            (source, number)
            for source, cut in enumerate(read_cuts(self))
            for number in range(len(cut.last_keys))
        ]


@dataclass(frozen=True)
class SelectionCut:
    """The selection of one source: its number of rows, and the keys that bound them."""

    selected: int
    after: str | None
    """The last key that an earlier merge has given."""
    last_keys: tuple[str, ...]
    """The last key of each range."""


def read_cuts(plan: MergePlan) -> list[SelectionCut]:
    """The selection, as the cut has saved it."""
    saved = json.loads((plan.temporary / "cuts.json").read_text())
    return [SelectionCut(selected, after, tuple(ranks)) for selected, after, ranks in saved]


def make_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Call `make` on a folder beside `folder` and rename it, unless `folder` is there."""
    if folder.is_dir():
        return
    beside = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    make(beside)
    beside.rename(folder)
