"""The events of one pipeline run, on disk before anywhere else, and how far they were shipped.

One folder a pipeline run: `run.json` (what it is), `events.jsonl` (append only), `cursor.json`
(how many bytes of events were shipped, the MLflow run of every key, how far each series is).
Every event can be applied twice with the same result, so a cursor that lags by one does no harm.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Self

from evaclip_model.files import lock_file, write_atomically

Event = Mapping[str, Any]
JOURNALS = "tracking"
"""Folder of all journals, under the root of the artifacts."""
PIPELINE = ""
"""Key of the pipeline's own run; a stage's key is its title and digest."""
RUNNING = "RUNNING"


@dataclass(frozen=True)
class SeriesCursor:
    """The point up to which a file of metrics was shipped."""

    offset: int = 0
    """Bytes read; a hint only, the file may have been cut back."""
    step: int = -1
    """Last step shipped; lines at or before it are not sent again."""
    file: int = 0
    """Inode of the file that `offset` belongs to: a resumed trainer puts a shorter one in its
    place, which may have grown past `offset` since."""
    is_open: bool = True
    """Whether its run goes on; a closed file is not read again."""


@dataclass
class Cursor:
    """The point up to which a journal was shipped."""

    offset: int = 0
    runs: dict[str, str] = field(default_factory=dict)
    """Key of a run in the journal -> MLflow's run id."""
    series: dict[str, SeriesCursor] = field(default_factory=dict)
    """`key|file` -> how far."""

    @classmethod
    def read(cls, path: Path) -> Cursor:
        try:
            stored = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            return cls()
        series = {name: SeriesCursor(**at) for name, at in stored["series"].items()}
        return cls(stored["offset"], stored["runs"], series)

    def open_series(self, key: str, file: str) -> None:
        """Follow a file of metrics for the run of `key`, from where it was left."""
        name = f"{key}|{file}"
        self.series[name] = replace(self.series.get(name, SeriesCursor()), is_open=True)

    def close_series(self, key: str) -> None:
        """Follow none of a run's files of metrics any more."""
        for file in self.files_of(key):
            self.series[f"{key}|{file}"] = replace(self.series[f"{key}|{file}"], is_open=False)

    def forget_run(self, key: str) -> None:
        """Ship all of a run of `key` once more, to another run; of the others, which events change
        nothing when they are applied again, too."""
        self.runs.pop(key, None)
        self.offset = 0
        for name in [name for name in self.series if name.startswith(f"{key}|")]:
            del self.series[name]

    def files_of(self, key: str) -> list[Path]:
        """The files of metrics that are followed for the run of `key`."""
        prefix = f"{key}|"
        return [
            Path(name.removeprefix(prefix))
            for name, at in self.series.items()
            if at.is_open and name.startswith(prefix)
        ]

    def write(self, path: Path) -> None:
        series = {name: vars(at) for name, at in self.series.items()}
        stored = {"offset": self.offset, "runs": self.runs, "series": series}
        write_atomically(path, json.dumps(stored) + "\n")


class Journal:
    """The events of one pipeline run, held by one process at a time."""

    def __init__(self, folder: Path, lock: IO[str]) -> None:
        self.folder = folder
        self._lock = lock
        self.about: dict[str, str] = json.loads((folder / "run.json").read_text())
        self._events = folder / "events.jsonl"
        _cut_torn_line(self._events)
        self.cursor = Cursor.read(folder / "cursor.json")

    @classmethod
    def create_journal(cls, root: Path, about: Mapping[str, str]) -> Self:
        """A new journal; `about` says what its run is."""
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
            lock = None if (about.parent / "shipped").exists() else lock_file(about.parent / "lock")
            if lock is not None:
                yield cls(about.parent, lock)

    def release(self) -> None:
        self._lock.close()

    def append_event(self, event: Event) -> None:
        """Add one event; a killed process does not lose it, a power cut may."""
        with self._events.open("a") as file:
            file.write(json.dumps(event, default=str) + "\n")

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
        statuses: dict[str, str] = {}
        for _, event in self.iterate_events():
            if event["op"] == "begin":
                statuses[event["run"]] = RUNNING
            elif event["op"] == "end":
                statuses[event["run"]] = event["status"]
        return statuses

    @property
    def is_closed(self) -> bool:
        """Whether the pipeline run ended; otherwise its process was killed, or is at work."""
        return self.run_statuses().get(PIPELINE, RUNNING) != RUNNING

    @property
    def pending(self) -> int:
        return sum(1 for _ in self.iterate_events(self.cursor.offset))

    def save_cursor(self) -> None:
        self.cursor.write(self.folder / "cursor.json")

    def mark_shipped(self) -> None:
        """Note that the run is closed and nothing is left to ship."""
        (self.folder / "shipped").touch()


def _cut_torn_line(path: Path) -> None:
    """Drop a last line that a killed process did not finish."""
    if path.exists():
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) != len(content):
            with path.open("r+b") as file:
                file.truncate(len(whole))


def runs_of_digest(journals: Path, digest: str) -> list[str]:
    """MLflow's ids of the runs of one stage's artifact, as far as this machine's journals know."""
    cursors = [Cursor.read(path) for path in sorted(journals.glob("*/cursor.json"))]
    return [
        run for cursor in cursors for key, run in cursor.runs.items() if key.endswith(f"-{digest}")
    ]


def now_ms() -> int:
    """Milliseconds since 1970, as MLflow counts the time of an event."""
    return int(time.time() * 1000)
