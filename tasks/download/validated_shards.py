"""A record of checked shards, so that starting again does not read all of them again.

Covers: one JSON line for each shard that was found whole, good as long as its files are as then.
Not here: the check (check_shards.py). 200,000 shards are 50 TB; their files' sizes and times are
seconds.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from evaclip_model.reading.samples import BrokenShard
from tasks.download.check_shards import FinishedShard, check_shard, shard_files
from tasks.download.fetch_outcome import Outcome
from tasks.download.url_tables import PlannedShard

Stamp = list[list[int]]
"""Size and time of change of each of a shard's files."""


class Ledger:
    """The whole shards of one folder, as the file at `path` remembers them."""

    def __init__(self, path: Path, folder: Path) -> None:
        self._path = path
        self._folder = folder
        self._known = _read_entries(path)

    def check_planned(self, planned: PlannedShard) -> FinishedShard:
        """The shard as remembered, or as `check_shard` finds it now.

        Raises:
            BrokenShard: as `check_shard`.
        """
        stamp = _file_stamp(self._folder, planned)
        known = self._known.get(planned.name)
        if known is None or known["stamp"] != stamp or known["rows"] != planned.rows:
            known = _make_entry(check_shard(self._folder, planned), stamp)
            self._known[planned.name] = known
            with self._path.open("a") as file:
                file.write(json.dumps(known) + "\n")
        outcomes = Counter({Outcome(word): number for word, number in known["outcomes"].items()})
        return FinishedShard(planned, outcomes, known["tar_bytes"], known["retry_after_s"])


def _make_entry(shard: FinishedShard, stamp: Stamp) -> dict[str, Any]:
    return {
        "shard": shard.planned.name,
        "rows": shard.planned.rows,
        "outcomes": {outcome.value: number for outcome, number in shard.outcomes.items()},
        "tar_bytes": shard.tar_bytes,
        "retry_after_s": shard.retry_after_s,
        "stamp": stamp,
    }


def _read_entries(path: Path) -> dict[str, dict[str, Any]]:
    """Entries by shard, the last one of each; a line that a kill cut short is nothing."""
    known: dict[str, dict[str, Any]] = {}
    if not path.exists():
        return known
    for line in path.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        known[entry["shard"]] = entry
    return known


def _file_stamp(folder: Path, planned: PlannedShard) -> Stamp:
    try:
        stats = [path.stat() for path in shard_files(folder, planned)]
    except OSError as error:
        raise BrokenShard(f"shard {planned.name} is unfinished or unreadable: {error}") from error
    return [[stat.st_size, stat.st_mtime_ns] for stat in stats]
