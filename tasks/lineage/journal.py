"""The events of one pipeline run, on disk before anywhere else, and how far they were shipped.

One folder a pipeline run: `run.json` (what it is), `events.jsonl` (append only), `cursor.json`.
Every event can be applied twice with the same result, so a cursor that lags, or is lost, does no
harm.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from evaclip_model.files import lock_file, write_atomically

Event = Mapping[str, Any]
JOURNALS = "tracking"
"""Folder of all journals, under the root of the artifacts."""
PIPELINE = ""
"""Key of the pipeline's own run; a stage's key is its title and digest."""
RUNNING = "RUNNING"
SHIPPED = "shipped"
"""File of a journal that is closed, with nothing left to ship."""


@dataclass
class Cursor:
    """The point up to which a journal was shipped."""

    offset: int = 0
    """Bytes of events."""
    runs: dict[str, str] = field(default_factory=dict)
    """Key of a run in the journal -> MLflow's run id."""
    steps: dict[str, dict[str, int]] = field(default_factory=dict)
    """Key of a run that goes on -> file of metrics -> last step shipped."""

    @classmethod
    def read(cls, path: Path) -> Cursor:
        try:
            return cls(**json.loads(path.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return cls()

    def forget_run(self, key: str) -> None:
        """Ship all of a run of `key` once more, to another run, and all others, where that changes
        nothing."""
        self.runs.pop(key, None)
        self.steps.pop(key, None)
        self.offset = 0


class Journal:
    """The events of one pipeline run, held by one process at a time."""

    def __init__(self, folder: Path, lock: IO[str]) -> None:
        self.folder = folder
        self._lock = lock
        self.about: dict[str, str] = json.loads((folder / "run.json").read_text())
        self._events = folder / "events.jsonl"
        if self._events.exists():  # a killed process may have left half a line
            os.truncate(self._events, self._events.read_bytes().rfind(b"\n") + 1)
        self.cursor = Cursor.read(folder / "cursor.json")

    @classmethod
    def create_journal(cls, root: Path, about: Mapping[str, str]) -> Self:
        key = uuid.uuid4().hex
        folder = root / key
        folder.mkdir(parents=True)
        lock = lock_file(folder / "lock")
        assert lock is not None, "a folder that was just made has no other holder"
        write_atomically(folder / "run.json", json.dumps({**about, "key": key}, indent=1) + "\n")
        return cls(folder, lock)

    @classmethod
    def claim_unshipped(cls, root: Path) -> Iterator[Self]:
        """Journals that are free and not both closed and shipped, locked one by one."""
        for about in sorted(root.glob("*/run.json")):
            lock = None if (about.parent / SHIPPED).exists() else lock_file(about.parent / "lock")
            if lock is not None:
                yield cls(about.parent, lock)

    def release(self) -> None:
        self._lock.close()

    def append_event(self, event: Event) -> None:
        """Add one event with its time, in milliseconds since 1970; a killed process does not lose
        it, a power cut may."""
        with self._events.open("a") as file:
            stamped = {"time": int(time.time() * 1000), **event}
            file.write(json.dumps(stamped, default=str) + "\n")

    def iterate_events(self, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """Events from byte `offset` on, each with the offset behind it."""
        if not self._events.exists():
            return
        with self._events.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                yield offset, json.loads(line)

    def run_statuses(self) -> dict[str, str]:
        """Every run that was begun: key -> RUNNING, or the status it ended with."""
        return {
            event["run"]: event.get("status", RUNNING)
            for _, event in self.iterate_events()
            if event["op"] in ("begin", "end")
        }

    @property
    def is_closed(self) -> bool:
        """Return whether the pipeline run ended; else its process was killed, or is at work."""
        return self.run_statuses().get(PIPELINE, RUNNING) != RUNNING

    @property
    def pending(self) -> int:
        return sum(1 for _ in self.iterate_events(self.cursor.offset))

    def save_cursor(self) -> None:
        write_atomically(self.folder / "cursor.json", json.dumps(asdict(self.cursor)) + "\n")


def runs_of_digest(journals: Path, digest: str) -> list[str]:
    """MLflow's ids of the runs of a stage's artifact, as far as this machine's journals know."""
    cursors = [Cursor.read(path) for path in sorted(journals.glob("*/cursor.json"))]
    return [
        run for cursor in cursors for key, run in cursor.runs.items() if key.endswith(f"-{digest}")
    ]
