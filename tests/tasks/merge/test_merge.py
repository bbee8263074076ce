from __future__ import annotations

import hashlib
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from evaclip_model.errors import InputError
from tasks.artifacts.artifact import Address, Made, read_inputs
from tasks.merge.config import STAGE, ColumnMap, FilterConfig, MergeConfig, SourceConfig
from tasks.merge.database import open_database
from tasks.merge.merge import merge_sources
from tasks.merge.units import Chunk, run_chunk
from tests.tasks.merge import metadata
from tests.tasks.merge.metadata import coyo, find_files, laion, output_rows, write

ROOT = Path(__file__).parents[3]
KILLED_RUN = """
import sys
from pathlib import Path
from tasks.merge.config import MergeConfig
from tasks.merge.merge import merge_sources
from tests.tasks.merge.metadata import find_files
config = MergeConfig.model_validate_json(Path(sys.argv[1]).read_text())
Path(sys.argv[2]).mkdir(exist_ok=True)
print("ready", flush=True)
merge_sources(config, find_files(config), Path(sys.argv[2]), threads=1)
"""


@pytest.fixture(scope="module")
def collections(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 LAION-2B files and 2 COYO-700M files, 5,000 rows, with duplicates of every kind."""
    folder = tmp_path_factory.mktemp("metadata")
    draw = random.Random(1)
    for part in range(3):
        rows = [
            laion(number, similarity=draw.choice([0.28, 0.3, 0.35]), TEXT=f"text {part} {number}")
            for number in draw.sample(range(2_000), 1_000)
        ]
        write(folder / f"laion/part-{part}.parquet", metadata.LAION_2B, rows)
    for part in range(2):
        rows = [coyo(number) for number in draw.sample(range(1_500), 700)]
        rows += [
            coyo(9_000 + number, url=laion(number)["URL"].replace("http:", "https:"))
            for number in draw.sample(range(2_000), 300)
        ]
        write(folder / f"coyo/part-{part}.parquet", metadata.COYO_700M, rows)
    return folder


def recipe(collections: Path, **changes: object) -> MergeConfig:
    targets = changes.pop("targets", (800, 200))
    sources = [
        {
            "name": name,
            "files": str(collections / f"{name}/*.parquet"),
            "own_rows": True,
            "target_count": target,
        }
        for name, target in zip(("laion", "coyo"), targets, strict=True)  # type: ignore[call-overload]
    ]
    return MergeConfig.from_mapping(
        {"sources": sources, "rows_per_file": 64, "seed": 7, **changes}, where="test"
    )


def run(config: MergeConfig, out: Path, threads: int | None = 1) -> Made:
    out.mkdir(parents=True)
    return merge_sources(config, find_files(config), out, threads=threads)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_every_file_but_a_sources_last_has_rows_per_file_rows_and_one_schema(
    collections: Path, tmp_path: Path
) -> None:
    made = run(recipe(collections), tmp_path / "out")
    parts = [path for path in made.files if path.suffix == ".parquet"]
    sizes = [pq.read_metadata(path).num_rows for path in parts]
    assert sizes == [64] * 12 + [32] + [64] * 3 + [8]
    assert len({pq.read_schema(path).to_string() for path in parts}) == 1
    assert made.counts["laion.selected"] == 800 and made.counts["coyo.selected"] == 200
    assert made.counts["coyo.dropped.duplicate_across_sources"] > 0
    assert not (tmp_path / "out/_tmp").exists()


def test_threads_partitions_and_memory_change_no_byte(collections: Path, tmp_path: Path) -> None:
    run(recipe(collections), tmp_path / "one", threads=1)
    run(recipe(collections, partitions=5, memory_limit="300MB"), tmp_path / "many", threads=4)
    assert digests(tmp_path / "one") == digests(tmp_path / "many")


def test_the_range_size_changes_no_byte(
    collections: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(recipe(collections), tmp_path / "one")
    monkeypatch.setattr("tasks.merge.merge_plan.ROWS_PER_RANGE", 130)
    run(recipe(collections), tmp_path / "many")
    assert digests(tmp_path / "one") == digests(tmp_path / "many")


def test_a_larger_target_selects_the_same_rows_first(collections: Path, tmp_path: Path) -> None:
    small = output_rows(run(recipe(collections, targets=(50, 20)), tmp_path / "small").files)
    large = output_rows(run(recipe(collections, targets=(400, 90)), tmp_path / "large").files)
    whole = output_rows(run(recipe(collections, targets=(None, None)), tmp_path / "all").files)
    for name, few, many in (("laion", 50, 400), ("coyo", 20, 90)):
        order = [row for row in whole if row["source"] == name]
        assert [row for row in large if row["source"] == name] == order[:many]
        assert [row for row in small if row["source"] == name] == order[:few]


def test_another_seed_selects_other_rows_of_the_same_survivors(
    collections: Path, tmp_path: Path
) -> None:
    def uids(out: str, **changes: object) -> list[str]:
        return [
            row["uid"]
            for row in output_rows(run(recipe(collections, **changes), tmp_path / out).files)
        ]

    everything = {"targets": (None, None)}
    assert sorted(uids("a", **everything)) == sorted(uids("b", seed=8, **everything))
    assert set(uids("c")) != set(uids("d", seed=8))


def test_the_winner_does_not_depend_on_how_rows_lie_in_files(tmp_path: Path) -> None:
    rows = [laion(n % 20, SAMPLE_ID=n, TEXT=f"text {n}", similarity=0.3) for n in range(60)]
    write(tmp_path / "a/laion/0.parquet", metadata.LAION_2B, rows)
    write(tmp_path / "b/laion/0.parquet", metadata.LAION_2B, rows[40:])
    write(tmp_path / "b/laion/1.parquet", metadata.LAION_2B, rows[:40][::-1])
    found = []
    for folder in ("a", "b"):
        source = SourceConfig(
            name="laion", files=str(tmp_path / folder / "laion/*.parquet"), own_rows=True
        )
        made = run(MergeConfig(sources=(source,)), tmp_path / f"out-{folder}")
        found.append(output_rows(made.files))
    assert found[0] == found[1]


@pytest.mark.parametrize("moment", range(6))
def test_killed_at_any_moment_and_run_again_gives_the_same_bytes(
    collections: Path, tmp_path: Path, moment: int
) -> None:
    config = recipe(collections, partitions=6, rows_per_file=16)
    started = time.monotonic()
    run(config, tmp_path / "whole")
    whole_s = time.monotonic() - started
    (tmp_path / "recipe.json").write_text(config.model_dump_json())
    out = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED_RUN, str(tmp_path / "recipe.json"), str(out)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    time.sleep(random.Random(moment).uniform(moment, moment + 1) / 6 * whole_s)
    child.send_signal(signal.SIGKILL)
    child.wait()
    merge_sources(config, find_files(config), out, threads=1)
    assert digests(out) == digests(tmp_path / "whole")


def test_an_interrupt_during_a_statement_stays_an_interrupt(tmp_path: Path) -> None:
    endless = "SELECT count(*) FROM range(1000000000) a, range(1000000000) b WHERE a.range % 7 = 3"
    stop = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt), open_database(tmp_path, "200MB", 1) as connection:
        stop.start()
        connection.execute(endless)


def test_too_little_memory_is_one_sentence(collections: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"more than memory_limit = 3MB: raise it"):
        run(recipe(collections, memory_limit="3MB"), tmp_path / "out")


def test_what_another_recipe_left_in_the_folder_is_cleared(
    collections: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "_tmp/rows/000000").mkdir(parents=True)
    (out / "_tmp/plan.json").write_text("{}")
    (out / "laion").mkdir()
    (out / "laion/part-99999.parquet").write_text("old")
    merge_sources(recipe(collections), find_files(recipe(collections)), out, threads=1)
    run(recipe(collections), tmp_path / "clean")
    assert digests(out) == digests(tmp_path / "clean")


def test_finished_units_are_not_done_again(collections: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop_at_write(done: float, total: float, detail: str = "") -> None:
        if detail.startswith("write"):
            raise Stop

    config, out = recipe(collections), tmp_path / "out"
    out.mkdir()
    with pytest.raises(Stop):
        merge_sources(config, find_files(config), out, stop_at_write, threads=1)
    before = {path: os.stat(path).st_mtime_ns for path in (out / "_tmp").glob("*/*/**/*.parquet")}
    assert before
    with pytest.raises(Stop):
        merge_sources(config, find_files(config), out, stop_at_write, threads=1)
    assert before == {path: os.stat(path).st_mtime_ns for path in before}


def test_progress_rises_to_the_number_of_rows(collections: Path, tmp_path: Path) -> None:
    seen: list[tuple[float, float]] = []
    out = tmp_path / "out"
    out.mkdir()
    config = recipe(collections)
    merge_sources(
        config, find_files(config), out, lambda done, total, detail="": seen.append((done, total))
    )
    assert seen == sorted(seen) and seen[0] == (0, 5_000) and seen[-1] == (5_000, 5_000)


@pytest.mark.parametrize(
    ("schema", "rows", "expected"),
    [
        (metadata.LAION_2B, [laion(1), laion(2, NSFW="NSFW")], {"1"}),
        (metadata.LAION_JOINED, [laion(1, hash=5), laion(2, hash=6, punsafe=0.9)], {"5"}),
        (metadata.COYO_700M, [coyo(3), coyo(4, nsfw_score_gantman=0.9)], {"3"}),
        (metadata.RELAION, [{"url": "http://a.example/1", "caption": "a cat"}], {None}),
    ],
)
def test_published_layouts_are_told_from_their_columns(
    tmp_path: Path, schema: object, rows: list[dict[str, object]], expected: set[str | None]
) -> None:
    path = write(tmp_path / "part.parquet", schema, rows)
    config = MergeConfig(sources=(SourceConfig(name="any", files=str(path), own_rows=True),))
    assert {
        row["original_id"] for row in output_rows(run(config, tmp_path / "out").files)
    } == expected


def test_an_explicit_column_map_may_name_any_column(tmp_path: Path) -> None:
    table = pq.read_table(
        write(
            tmp_path / "x.parquet",
            metadata.RELAION,
            [{"url": "http://a.example", "caption": "cat"}],
        )
    )
    names = ['the "url"', "select", "score", "language"]
    pq.write_table(table.rename_columns(names), tmp_path / "x.parquet")
    columns = ColumnMap(url='the "url"', caption="select", similarity="score")
    source = SourceConfig(name="mine", files=str(tmp_path / "x.parquet"), columns=columns)
    [row] = output_rows(run(MergeConfig(sources=(source,)), tmp_path / "out").files)
    assert (row["url"], row["caption"], row["similarity"]) == ("http://a.example/", "cat", 0.3)


def test_folder_and_file_names_are_never_sql_or_globs(tmp_path: Path) -> None:
    folder = tmp_path / "it's [1] *; --"
    path = write(folder / "a=b/part '1'.parquet", metadata.COYO_700M, [coyo(1), coyo(2)])
    config = MergeConfig(sources=(SourceConfig(name="coyo", files="-"),))
    out = folder / "out"
    out.mkdir()
    made = merge_sources(config, {"coyo": [path]}, out, threads=1)
    assert made.counts["selected"] == 2


def test_memory_and_partitions_are_no_part_of_the_address(
    collections: Path, tmp_path: Path
) -> None:
    def digest(**changes: object) -> str:
        return Address.of(tmp_path, STAGE, recipe(collections, **changes)).digest

    assert digest() == digest(partitions=9, memory_limit="1GB")
    assert len({digest(), digest(seed=8), digest(rows_per_file=32), digest(targets=(1, 2))}) == 4


def test_rules_of_missing_values_follow_their_policy(tmp_path: Path) -> None:
    rows = [
        coyo(1, nsfw_score_gantman=None),
        coyo(2, clip_similarity_vitb32=None),
        coyo(3, watermark_score=None),
    ]

    def kept(out: str, filters: FilterConfig) -> Sequence[str]:
        made = run(MergeConfig(sources=(source,), filters=filters), tmp_path / out)
        return sorted(row["original_id"] for row in output_rows(made.files))

    path = write(tmp_path / "part.parquet", metadata.COYO_700M, rows)
    source = SourceConfig(name="coyo", files=str(path))
    assert kept("default", FilterConfig(min_similarity=0.1)) == ["3"]
    strict = FilterConfig(unknown_watermark="drop")
    assert kept("strict", strict) == ["2"]
    loose = FilterConfig(min_similarity=0.1, unknown_similarity="keep", unknown_unsafe="keep")
    assert kept("loose", loose) == ["1", "2", "3"]


def test_chunks_in_any_order_and_side_by_side_change_no_byte(
    collections: Path, tmp_path: Path
) -> None:
    phases: list[tuple[str, int]] = []

    def backwards_on_threads(chunks: Sequence[Chunk]) -> Iterator[int]:
        phases.extend((chunk.phase, len(chunk.numbers)) for chunk in chunks)
        with ThreadPoolExecutor(3) as pool:
            sent = pickle.loads(pickle.dumps(list(reversed(chunks))))
            for numbers in pool.map(lambda chunk: list(run_chunk(chunk)), sent):
                yield from numbers

    config = recipe(collections, partitions=5, rows_per_file=16)
    run(config, tmp_path / "one")
    out = tmp_path / "many"
    out.mkdir()
    merge_sources(*(config, find_files(config), out), threads=1, run=backwards_on_threads, chunks=3)
    assert digests(out) == digests(tmp_path / "one")
    sizes = {name: [size for phase, size in phases if phase == name] for name, _ in phases}
    assert sizes["scan"] == sizes["dedupe"] == [2, 2, 1]


def test_what_was_finished_before_a_kill_is_not_done_again(
    collections: Path, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def stop_before_rows_are_written(done: float, total: float, detail: str = "") -> None:
        if detail.startswith("write"):
            raise Stop

    config = recipe(collections, partitions=40, rows_per_file=16)
    (tmp_path / "recipe.json").write_text(config.model_dump_json())
    out = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED_RUN, str(tmp_path / "recipe.json"), str(out)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(list(out.glob("_tmp/kept/??????"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    units = [*out.glob("_tmp/rows/??????"), *out.glob("_tmp/kept/??????")]
    before = {
        file: (file.stat().st_ino, file.stat().st_mtime_ns)
        for unit in units
        for file in unit.rglob("*.parquet")
    }
    finished = len(list(out.glob("_tmp/kept/??????")))
    assert 5 <= finished < 40 and len(list(out.glob("_tmp/rows/??????"))) == 5
    with pytest.raises(Stop):
        merge_sources(config, find_files(config), out, stop_before_rows_are_written, threads=1)
    assert len(list(out.glob("_tmp/kept/??????"))) == 40
    assert before == {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in before}
    merge_sources(config, find_files(config), out, threads=1)
    run(config, tmp_path / "whole")
    assert digests(out) == digests(tmp_path / "whole")


def test_back_fill_goes_on_where_the_first_selection_ended(
    collections: Path, tmp_path: Path
) -> None:
    def rows(out: str, **source: object) -> list[str]:
        settings = {"name": "laion", "files": str(collections / "laion/*.parquet"), **source}
        config = MergeConfig.from_mapping(
            {"sources": [{**settings, "own_rows": True}], "seed": 7}, where="test"
        )
        return [row["uid"] for row in output_rows(run(config, tmp_path / out).files)]

    everything = rows("all")
    first = rows("first", target_count=60, expected_success=0.6)
    assert first == everything[:100]
    assert (
        rows("more", target_count=30, expected_success=0.6, skip_count=100) == everything[100:150]
    )
    assert rows("rest", skip_count=150) == everything[150:]
    with pytest.raises(InputError, match="nothing to fill back with"):
        rows("none", skip_count=len(everything))


def test_rows_tell_which_other_sources_have_them(collections: Path, tmp_path: Path) -> None:
    made = run(recipe(collections, targets=(None, None)), tmp_path / "out")
    shared = [row for row in output_rows(made.files) if row["also_in"]]
    assert {(row["source"], row["also_in"]) for row in shared} == {("laion", "coyo")}


def addresses(files: Sequence[Path]) -> set[str]:
    return {row["url"].partition("://")[2] for row in output_rows(files)}


def test_what_earlier_merges_gave_is_not_given_again(collections: Path, tmp_path: Path) -> None:
    everything = run(recipe(collections, targets=(None, None)), tmp_path / "all")
    first = run(recipe(collections, targets=(300, 100)), tmp_path / "first")
    config = recipe(collections, targets=(None, None), seed=99, partitions=3)
    (tmp_path / "rest").mkdir()
    given = [tmp_path / "first"]
    rest = merge_sources(config, find_files(config), tmp_path / "rest", threads=1, given=given)
    assert addresses(first.files).isdisjoint(addresses(rest.files))
    assert addresses(first.files) | addresses(rest.files) == addresses(everything.files)
    # coyo's copy of an address that laion gave before is given before too, not a duplicate
    assert rest.counts["dropped.given_before"] >= 400
    for name in ("laion", "coyo"):
        counts = {k: n for k, n in rest.counts.items() if k.startswith(f"{name}.dropped.")}
        selected = rest.counts[f"{name}.selected"]
        assert rest.counts[f"{name}.rows_read"] == selected + sum(counts.values())


def test_a_merge_after_everything_was_given_has_no_row_and_says_so_in_its_counts(
    collections: Path, tmp_path: Path
) -> None:
    config = recipe(collections, targets=(None, None))
    run(config, tmp_path / "first")
    (tmp_path / "none").mkdir()
    none = merge_sources(
        config, find_files(config), tmp_path / "none", threads=1, given=[tmp_path / "first"]
    )
    assert none.counts["selected"] == 0
    assert output_rows(none.files) == []


def test_a_merge_lists_its_files_by_content_so_that_moving_them_changes_nothing(
    collections: Path, tmp_path: Path
) -> None:
    run(recipe(collections), tmp_path / "here")
    shutil.copytree(collections, tmp_path / "moved")
    run(recipe(tmp_path / "moved"), tmp_path / "there")
    assert read_inputs(tmp_path / "here") == read_inputs(tmp_path / "there")
    assert {name: len(marks) for name, marks in read_inputs(tmp_path / "here").items()} == {
        "laion": 3,
        "coyo": 2,
    }
    assert read_inputs(tmp_path) == {}, "made before there was such a list"
