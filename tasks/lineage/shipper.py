"""The thread that carries a journal's events to MLflow while work goes on.

Covers: order, waiting for a store that is away, what earlier runs left behind.
Not here: what an event does in the store (events.py), metrics files (series.py), the journal's
files (journal.py).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.lineage.journal import Journal
from tasks.lineage.metric_series import open_series, ship_series
from tasks.lineage.run_events import apply, close_killed
from tasks.tracking import TrackingStore, is_answer

if TYPE_CHECKING:
    from mlflow import MlflowClient

POLL_S = 1.0
LONGEST_BACKOFF_S = 30.0
LEFTOVERS_S = 10.0
"""How long what earlier runs left may keep back the events of a run that is at work."""
_log = logging.getLogger(__name__)


class Shipper(threading.Thread):
    """Applies a journal's events to the store, in order, in the background, until told to stop."""

    def __init__(self, store: TrackingStore, journals: Path, journal: Journal) -> None:
        """Nothing is contacted yet.

        Args:
            store: where events go.
            journals: folder of all journals, with what earlier runs left.
            journal: of this run.
        """
        super().__init__(name="lineage", daemon=True)
        self._store = store
        self._journals = journals
        self._journal = journal
        self._changed = threading.Event()
        self._closing = threading.Event()
        self._abandoned = threading.Event()
        self._shipped_one = threading.Condition()
        self._client: MlflowClient | None = None
        self._last_error: Exception | None = None
        self._experiments: dict[str, str] = {}

    @property
    def experiment(self) -> str | None:
        """The experiment's id, once the store was reached."""
        return self._experiments.get(self._store.experiment)

    def wake(self) -> None:
        """There is an event to ship."""
        self._changed.set()

    def run_id(self, key: str, wait_s: float) -> str | None:
        """MLflow's id of a run by its key, or None when that is not known within `wait_s`."""
        with self._shipped_one:
            self._shipped_one.wait_for(lambda: key in self._journal.cursor.runs, wait_s)
            return self._journal.cursor.runs.get(key)

    def finish(self, patience_s: float) -> None:
        """Ship the rest, for at most `patience_s` seconds, or at most until the store fails."""
        self._closing.set()
        self.wake()
        self.join(patience_s)
        self._abandoned.set()
        waiting = self._journal.pending
        if waiting:
            _log.warning(
                "%d tracking events wait in %s: the next run ships them (%s does not answer: %s)",
                waiting,
                self._journal.folder,
                self._store.uri,
                str(self._last_error)[:200],
            )

    def run(self) -> None:
        backoff, leftovers = POLL_S, True
        try:
            while True:
                closing = self._closing.is_set()
                self._changed.clear()
                try:
                    self._ship(self._journal, self._abandoned.is_set)
                    backoff = POLL_S
                    if leftovers or closing:
                        leftovers = self._ship_leftovers(closing)
                    if closing:
                        return
                except Exception as error:  # the store may fail in any way; work must go on
                    self._last_error = error
                    backoff = min(backoff * 2, LONGEST_BACKOFF_S)
                    if closing:
                        return
                    self._closing.wait(backoff)
                else:
                    self._changed.wait(backoff)
        finally:
            self._journal.release()

    def _ship_leftovers(self, closing: bool) -> bool:
        """Ship what earlier runs could not, and close in the store what was killed.

        Meanwhile this run's own events wait, so that until it closes there is a limit of time;
        returns whether something is left.
        """
        until = time.monotonic() + (float("inf") if closing else LEFTOVERS_S)

        def give_up() -> bool:
            return self._abandoned.is_set() or time.monotonic() > until

        for left in Journal.unshipped(self._journals):
            if give_up():
                left.release()
                return True
            self.ship_left(left, give_up)
        return False

    def ship_left(self, left: Journal, give_up: Callable[[], bool]) -> None:
        """Ship one journal that an earlier run left, close in the store what was killed, let the
        journal go. One that can never be shipped must not keep back others: nothing is raised."""
        try:
            if left.about["uri"] != self._store.uri:
                return
            if self._ship(left, give_up) and not left.is_closed:
                close_killed(self._connected(), left)
        except Exception as error:
            self._last_error = error
            _log.warning("%s waits for another run: %s", left.folder, str(error)[:200])
        finally:
            left.release()

    def _connected(self) -> MlflowClient:
        if self._client is None:
            self._client = self._store.client()
        return self._client

    def _experiment_id(self, client: MlflowClient, name: str) -> str:
        if name not in self._experiments:
            self._experiments[name] = TrackingStore(self._store.uri, name).experiment_id(client)
        return self._experiments[name]

    def _ship(self, journal: Journal, give_up: Callable[[], bool]) -> bool:
        """Apply the journal's events that wait; False when `give_up()` ended it early."""
        client = self._connected()
        experiment = self._experiment_id(client, journal.about["experiment"])
        series = open_series(journal)
        for offset, event in journal.events(journal.cursor.offset):
            if give_up():
                return False
            if event["op"] == "series":
                series.setdefault(event["run"], []).append(Path(event["file"]))
            elif event["op"] == "end":
                for file in series.pop(event["run"], []):
                    if not ship_series(client, journal, event["run"], file, give_up):
                        return False
            try:
                apply(client, experiment, journal, event)
            except (FileNotFoundError, KeyError) as error:
                _log.warning("tracking event %s skipped: %s", event["op"], error)
            except Exception as error:
                if not is_answer(client, error):
                    raise
                _log.warning("tracking store refused %s: %s", event["op"], str(error)[:300])
            with self._shipped_one:
                journal.cursor.offset = offset
                journal.save_cursor()
                self._shipped_one.notify_all()
        for key, files in series.items():
            for file in files:
                if not ship_series(client, journal, key, file, give_up):
                    return False
        if journal.is_closed:
            journal.mark_shipped()
        return True
