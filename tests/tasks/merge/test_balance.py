from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from evaclip_model.errors import InputError
from tasks.artifacts.artifact import Address
from tasks.merge.config import STAGE, MergeConfig
from tasks.merge.database import copy_statement, load_statement
from tasks.merge.merge import merge_sources
from tasks.merge.merge_plan import MARKS, pairs_statement, read_entries
from tasks.merge.metadata_files import outside_files
from tests.tasks.merge import metadata, reference
from tests.tasks.merge.metadata import coyo, find_files, laion, output_rows, write
from tests.tasks.merge.test_merge import KILLED_RUN, ROOT, digests, run

WORDS = ["the", "red", "of", "apple", "new", "York", "cat,", "dog.", "Zoë", "tree", "1984", "-"]
FREQUENT_FIRST = [90, 50, 40, 30, 20, 10, 8, 5, 3, 2, 1, 9]
ENTRIES = ["the", "red", "of", "new York", "of the new", "Zoë", "1984", "cat", "red red", "unicorn"]


@pytest.fixture(scope="module")
def collections(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 LAION-2B files and a COYO-700M file, 4,000 rows, and a list of entries."""
    folder, draws = tmp_path_factory.mktemp("metadata"), random.Random(2)

    def caption() -> str:
        return " ".join(draws.choices(WORDS, FREQUENT_FIRST, k=draws.randint(2, 7)))

    rows = [laion(number, TEXT=caption()) for number in range(3_000)]
    for part in range(2):
        write(folder / f"laion/{part}.parquet", metadata.LAION_2B, rows[part::2])
    others = [coyo(number, text=caption()) for number in range(800)]
    others += [coyo(9_000 + n, url=laion(n)["URL"], text=caption()) for n in range(200)]
    write(folder / "coyo/0.parquet", metadata.COYO_700M, others)
    (folder / "entries.txt").write_text("\n".join(ENTRIES))
    return folder


def recipe(collections: Path, t: int | None, entries: object = None, **changes: Any) -> MergeConfig:
    balance = {"t": t, "entries": entries or str(collections / "entries.txt")} if t else None
    sources = [
        {"name": name, "files": str(collections / f"{name}/*.parquet"), "own_rows": True}
        for name in ("laion", "coyo")
    ]
    settings = {"sources": sources, "rows_per_file": 64, "seed": 7, "balance": balance, **changes}
    return MergeConfig.from_mapping(settings, where="test")


def kept(config: MergeConfig, out: Path) -> list[dict[str, Any]]:
    return output_rows(run(config, out).files)


def report_of(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "report.json").read_text())["balance"]
    return report


texts = st.text("ab,.!` é", max_size=12).map(reference.tidy)
entry_texts = st.text("ab,.!` é", min_size=1, max_size=6).map(str.strip).filter(bool)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(texts, min_size=1, max_size=8), st.lists(entry_texts, max_size=8, unique=True))
def test_runs_of_words_are_the_substrings_of_the_published_rule(
    tmp_path: Path, captions: Sequence[str], entries: Sequence[str]
) -> None:
    prefixes = str(tmp_path / "prefixes.parquet")
    with duckdb.connect() as connection:
        numbers = pa.array(range(len(entries)), pa.int32())
        table = {"number": numbers, "entry": pa.array(entries, pa.string())}
        connection.register("listed", pa.table(table))
        copying = copy_statement(load_statement("prefixes"), "CODEC uncompressed")
        connection.execute(copying, {"target": prefixes})
        rows = {"row": range(len(captions)), "caption": pa.array(captions, pa.string())}
        connection.register("part_rows", pa.table(rows))
        most_words = max((len(entry.split(" ")) for entry in entries), default=1)
        parameters = {"prefixes": prefixes, "marks": MARKS}
        connection.execute(pairs_statement(most_words), parameters)
        found = connection.execute("FROM pairs").fetchall()
    assert sorted(found) == [
        (row, entries.index(entry))
        for row, caption in enumerate(captions)
        for entry in sorted(reference.held_entries(caption, entries), key=entries.index)
    ]


def test_a_smaller_t_keeps_some_of_the_rows_and_the_report_knew_how_many(
    collections: Path, tmp_path: Path
) -> None:
    everything = kept(recipe(collections, None), tmp_path / "all")
    larger, promised = everything, {}
    for t in (400, 100, 25):
        rows = kept(recipe(collections, t), tmp_path / str(t))
        assert rows == [row for row in larger if row in rows], "in the same order, too"
        assert 0 < len(rows) < len(larger)
        report = report_of(tmp_path / str(t))
        assert promised.setdefault(t, len(rows)) == len(rows)
        promised |= {one["t"]: one["rows"] for one in report["kept_at"]}
        larger = rows


def test_of_an_entry_that_more_hold_about_t_rows_stay_and_of_a_rare_one_all(
    collections: Path, tmp_path: Path
) -> None:
    everything = kept(recipe(collections, None), tmp_path / "all")
    entries = tmp_path / "one.txt"
    entries.write_text("the\nZoë\n")
    rows = kept(recipe(collections, 300, str(entries)), tmp_path / "some")

    def holding(entry: str, rows: Sequence[dict[str, Any]]) -> set[str]:
        captions = {row["uid"]: row["caption"] for row in rows}
        return {uid for uid, text in captions.items() if reference.held_entries(text, [entry])}

    assert holding("Zoë", rows) == holding("Zoë", everything)
    drawn = holding("the", everything) - holding("Zoë", everything)
    expected = len(drawn) * 300 / len(holding("the", everything))
    assert abs(len(holding("the", rows) & drawn) - expected) < 5 * expected**0.5
    counted = json.loads((tmp_path / "some/entries.json").read_text())
    assert counted == {name: len(holding(name, everything)) for name in ("the", "Zoë")}


def test_the_report_has_every_dropped_row_and_entries_by_their_rows(
    collections: Path, tmp_path: Path
) -> None:
    made = run(recipe(collections, 100), tmp_path / "out")
    counts, report = made.counts, report_of(tmp_path / "out")
    held = json.loads((tmp_path / "out/entries.json").read_text())
    assert list(held) == ENTRIES and held["unicorn"] == 0
    assert counts["dropped.no_entry"] > 0 and counts["dropped.too_frequent"] > 0
    assert counts["rows_read"] == counts["selected"] + counts["dropped"]
    assert report["matches"] == sum(held.values()) == counts["balance.matches"]
    assert report["entries_above_t"] == sum(rows > 100 for rows in held.values())
    assert report["matches_above_t"] == sum(rows for rows in held.values() if rows > 100)
    assert sum(one["entries"] for one in report["entries_by_rows"]) == len(ENTRIES)
    assert report["entries_by_rows"][0] == {"at_least": 0, "entries": 1, "matches": 0}
    assert report["most_frequent"][0] == {"entry": "the", "rows": max(held.values())}
    assert counts["balance.kept_at.100"] == counts["selected"]


def test_entries_are_made_from_captions_by_the_stated_rule_and_serve_as_a_list(
    collections: Path, tmp_path: Path
) -> None:
    everything = kept(recipe(collections, None), tmp_path / "all")
    rows = kept(recipe(collections, 50, 30, partitions=5), tmp_path / "made")
    held = json.loads((tmp_path / "made/entries.json").read_text())
    assert list(held) == reference.derive_entries([row["caption"] for row in everything], 30)
    listed = str(tmp_path / "made/entries.json")
    assert kept(recipe(collections, 50, listed), tmp_path / "again") == rows


def test_entries_of_many_rows_are_made_from_those_that_come_first(
    collections: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.merge.units.SAMPLED_ROWS", 400)
    for partitions in (1, 7):
        run(recipe(collections, 50, 30, partitions=partitions), tmp_path / str(partitions))
    assert digests(tmp_path / "1") == digests(tmp_path / "7")
    everything = kept(recipe(collections, None), tmp_path / "all")
    last = (400 << 16) // 4_000

    def place(row: dict[str, Any]) -> int:
        return int(reference.rank(7, row["url"].partition("://")[2])[:4], 16)

    captions = [row["caption"] for row in everything if place(row) <= last]
    held = json.loads((tmp_path / "1/entries.json").read_text())
    assert 300 < len(captions) < 500
    assert list(held) == reference.derive_entries(captions, 30)


def test_threads_partitions_and_memory_change_no_byte(collections: Path, tmp_path: Path) -> None:
    run(recipe(collections, 60), tmp_path / "one", threads=1)
    many = recipe(collections, 60, partitions=5, memory_limit="300MB")
    run(many, tmp_path / "many", threads=4)
    assert digests(tmp_path / "one") == digests(tmp_path / "many")


def test_targets_are_cut_after_balancing(collections: Path, tmp_path: Path) -> None:
    balanced = kept(recipe(collections, 60), tmp_path / "all")
    config = recipe(collections, 60)
    sources = [one.model_copy(update={"target_count": 70}) for one in config.sources]
    config = config.model_copy(update={"sources": tuple(sources)})
    for name, wanted in (("laion", 70), ("coyo", 70)):
        of_source = [row for row in balanced if row["source"] == name]
        rows = kept(config, tmp_path / name)
        assert [row for row in rows if row["source"] == name] == of_source[:wanted]


def test_only_rows_of_this_merge_are_counted(collections: Path, tmp_path: Path) -> None:
    config = recipe(collections, None)
    few = config.sources[0].model_copy(update={"target_count": 2_500})
    first = run(config.model_copy(update={"sources": (few,)}), tmp_path / "first")
    assert first.counts["selected"] == 2_500
    out = tmp_path / "second"
    out.mkdir()
    config = recipe(collections, 4_000)
    files, before = find_files(config), [tmp_path / "first"]
    made = merge_sources(config, files, out, threads=1, given=before)
    rows = output_rows(made.files)
    held = json.loads((out / "entries.json").read_text())
    assert held == {
        entry: sum(entry in reference.held_entries(row["caption"], ENTRIES) for row in rows)
        for entry in ENTRIES
    }, "fewer than t rows hold each, so all of them stay"


@pytest.mark.parametrize("phase", ["matched", "balanced"])
def test_killed_while_it_balances_and_run_again_gives_the_same_bytes(
    collections: Path, tmp_path: Path, phase: str
) -> None:
    config = recipe(collections, 60, partitions=40, rows_per_file=16)
    (tmp_path / "recipe.json").write_text(config.model_dump_json())
    out = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED_RUN, str(tmp_path / "recipe.json"), str(out)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while len(list(out.glob(f"_tmp/{phase}/??????"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    finished = list(out.glob(f"_tmp/{phase}/??????/*.parquet"))
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in finished}
    assert 3 <= len({path.parent for path in finished}) < 40

    class Stop(Exception):
        pass

    def stop_before_rows_are_written(done: float, total: float, detail: str = "") -> None:
        if detail.startswith("write"):
            raise Stop

    with pytest.raises(Stop):
        merge_sources(config, find_files(config), out, stop_before_rows_are_written, threads=1)
    assert before == {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in before}
    merge_sources(config, find_files(config), out, threads=1)
    run(config, tmp_path / "whole")
    assert digests(out) == digests(tmp_path / "whole")


def test_progress_rises_to_the_number_of_rows_and_names_the_phases(
    collections: Path, tmp_path: Path
) -> None:
    seen: list[tuple[float, float]] = []
    details: list[str] = []

    def report(done: float, total: float, detail: str = "") -> None:
        seen.append((done, total))
        details.append(detail)

    config, out = recipe(collections, 60, partitions=3), tmp_path / "out"
    out.mkdir()
    merge_sources(config, find_files(config), out, report)
    assert seen == sorted(seen) and seen[0] == (0, 4_000) and seen[-1] == (4_000, 4_000)
    assert {"match: 2 of 3", "balance: 3 of 3"} <= set(details)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("e.txt", b"", "has 0 entries, not 1 to 2,000,000"),
        ("e.txt", b"\n \n", "has 0 entries"),
        (
            "e.txt",
            b"caf\xe9\n",
            "cannot be read .*: name a text file .UTF-8. with one entry a line",
        ),
        ("e.txt", b"cat\n\n dog \ndog\n", "entry 4, 'dog', is entry 3 again: take one out"),
        ("e.txt", b"cat\n" + b"x" * 301, "entry 2 is not a text of at most 300 characters"),
        ("e.json", b'["cat", 7]', "entry 2 is not a text of at most 300 characters"),
        ("e.json", b'"cat"', "cannot be read .it is not a list.*or a .json with a list of texts"),
        ("e.json", b"[", "cannot be read"),
        ("e.json", b"[" * 100_000, "cannot be read"),
        ("e.json", b'["\\ud800"]', "cannot be read"),
    ],
)
def test_a_bad_list_of_entries_is_one_sentence_before_any_long_work(
    collections: Path, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said) as raised:
        run(recipe(collections, 60, str(tmp_path / name)), tmp_path / "out")
    assert str(raised.value).startswith(f"merge.balance.entries: {tmp_path / name}")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out/_tmp/rows").exists()


def test_lists_are_read_in_both_forms(tmp_path: Path) -> None:
    (tmp_path / "e.txt").write_bytes("\ufeffcat\r\n\r\nnew York\r\n".encode())
    (tmp_path / "e.json").write_text('["cat", "new York"]')
    assert read_entries(str(tmp_path / "e.txt")) == ["cat", "new York"]
    assert read_entries(str(tmp_path / "e.json")) == ["cat", "new York"]


@pytest.mark.parametrize(
    ("balance", "said"),
    [
        ({"t": 0, "entries": 5}, "balance.t"),
        ({"t": 5}, "balance.entries"),
        ({"t": 5, "entries": 0}, "balance.entries"),
        ({"t": 5, "entries": ""}, "balance.entries"),
    ],
)
def test_wrong_settings_are_named(balance: dict[str, object], said: str) -> None:
    source = {"name": "a", "files": "-"}
    with pytest.raises(InputError, match=said):
        MergeConfig.from_mapping({"sources": [source], "balance": balance}, where="test")


def test_without_balancing_a_merge_keeps_its_address_and_with_it_the_list_counts(
    collections: Path, tmp_path: Path
) -> None:
    plain, balanced = recipe(collections, None), recipe(collections, 60)
    assert "balance" not in plain.compute_identity()
    addresses = {
        Address.of(tmp_path, STAGE, config).digest
        for config in (plain, balanced, recipe(collections, 61), recipe(collections, 60, 9))
    }
    assert len(addresses) == 4
    roles = {one.role: one.files for one in outside_files(balanced)}
    assert roles["balance.entries"] == str(collections / "entries.txt")
    assert "balance.entries" not in {one.role for one in outside_files(recipe(collections, 60, 9))}


def test_captions_without_any_entry_leave_nothing_and_the_reason_is_said(
    collections: Path, tmp_path: Path
) -> None:
    (tmp_path / "e.txt").write_text("unicorn")
    with pytest.raises(InputError, match=r"no row left.* dropped as no_entry"):
        run(recipe(collections, 60, str(tmp_path / "e.txt")), tmp_path / "out")
