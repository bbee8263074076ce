"""A list of every fault, in two passes, against four hosts on loopback.

`make test-download-faults` does the same with 5,000 rows and ten kills.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from tasks.artifacts.artifact import Made
from tasks.download import download as download_module
from tasks.download.config import Crew
from tasks.download.download import download_images
from tasks.download.fetch_outcome import RETRYABLE, Outcome
from tests.tasks.download.faults import (
    BUSY,
    CONFIG,
    PRIVATE,
    Row,
    four_hosts,
    outcomes_of,
    rows_of,
    write_rows,
)
from tests.tasks.download.web import Web

SMALL = CONFIG.model_copy(update={"samples_per_shard": 16})
ROWS = 96


@dataclass
class Run:
    merged: Path
    out: Path
    made: Made
    rows: dict[str, Row]
    webs: dict[str, Web]
    hits_of_again: int


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Stopped in the second pass, run to the end, and run once more."""
    merged, out = tmp_path_factory.mktemp("merged"), tmp_path_factory.mktemp("out")
    with four_hosts() as webs:
        rows = write_rows(merged, rows_of(webs["127.0.0.1"].port, ROWS, 1, 1))

        def stop(done: float, total: float, detail: str = "") -> None:
            if (out / "pass-2" / "shards").exists():
                raise Interrupted

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(download_module, "NOTE_EVERY_S", 0.0)
            download_images(SMALL, merged, out, Crew(2, 8), stop)
        made = download_images(SMALL, merged, out, Crew(2, 8), lambda *_: None)
        before = sum(web.hits.total() for web in webs.values())
        again = download_images(SMALL, merged, out, Crew(2, 8), lambda *_: None)
        assert again == made
        hits_of_again = sum(web.hits.total() for web in webs.values()) - before
        return Run(merged, out, made, rows, webs, hits_of_again)


def test_every_row_ends_as_its_fault_must(run: Run) -> None:
    ended = outcomes_of(run.out)
    wrong = {
        (row.kind, row.url): (row.expected, ended.get(uid))
        for uid, row in run.rows.items()
        if ended.get(uid) is not row.expected
    }
    assert wrong == {}
    expected = Counter(row.expected for row in run.rows.values())
    counts = run.made.counts
    assert counts["samples"] == expected.pop(Outcome.SUCCESS)
    assert {f"failed.{outcome.value}": n for outcome, n in expected.items()} == {
        name: n for name, n in counts.items() if name.startswith("failed.")
    }
    assert counts["rows"] == len(run.rows) == ROWS


def test_a_private_host_is_never_reached_and_a_busy_one_is_spared(run: Run) -> None:
    assert run.webs[PRIVATE].hits.total() == 0
    assert max(run.webs[BUSY].hits.values()) <= 4, "its Retry-After is beyond the deadline"


def test_the_second_pass_tries_what_may_pass_and_nothing_else(run: Run) -> None:
    # a row that the web let through at the second try of the first pass is not among them
    counts = run.made.counts
    retryable = sum(row.expected in RETRYABLE for row in run.rows.values())
    assert retryable <= counts["pass2.rows"] <= retryable + 8
    assert counts["pass2.samples"] == counts["pass2.rows"] - retryable
    assert not (run.out / "pass-3").exists()


def test_speed_and_success_are_noted_for_tracking(run: Run) -> None:
    notes = [json.loads(line) for line in (run.out / "progress.jsonl").read_text().splitlines()]
    steps = [note["step"] for note in notes]
    assert steps == sorted(steps)
    assert steps[-1] >= ROWS
    assert max(note["urls_per_s"] for note in notes) > 0
    assert 0 < max(note["success_rate"] for note in notes) <= 1
    assert run.out / "progress.jsonl" not in (*run.made.files, *run.made.bulk)


def names_in(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return tar.getnames()


def test_keys_are_unique_over_all_passes(run: Run) -> None:
    tars = [path for path in run.made.bulk if path.suffix == ".tar"]
    names = [name for path in tars for name in names_in(path)]
    assert len(names) == len(set(names)) == 3 * run.made.counts["samples"]
    assert len({path.name for path in tars}) == len(tars) == run.made.counts["shards"]


def test_a_finished_download_asks_nobody(run: Run) -> None:
    assert run.hits_of_again == 0


@pytest.mark.slow
def test_a_later_pass_is_forgotten_when_an_earlier_shard_has_to_be_made_again(run: Run) -> None:
    lost = next((run.out / "shards").glob("*.tar"))
    marked = run.out / "pass-2" / "mark"
    marked.touch()
    lost.unlink()
    with four_hosts(run.webs["127.0.0.1"].port):
        made = download_images(SMALL, run.merged, run.out, Crew(2, 8), lambda *_: None)
    assert not marked.exists()
    assert made.counts["samples"] == run.made.counts["samples"]
    assert outcomes_of(run.out).keys() == run.rows.keys()
