"""Real img2dataset against a loopback web: a whole run, a killed run, a dead web.

Each img2dataset call costs about 12 s, so runs are shared by the tests of this module.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaclip_model.errors import InputError
from evaclip_model.reading.samples import BrokenShard, read_samples
from tasks.artifacts.artifact import Made
from tasks.artifacts.root_store import open_working_copy
from tasks.download import download as download_module, shards
from tasks.download.config import Crew, DownloadConfig
from tasks.download.download import download_images
from tasks.download.download_worker import open_files_needed
from tasks.download.fetch_outcome import Outcome
from tasks.download.shards import Ledger, PlannedShard, check_shard, plan_download
from tasks.download.watch_progress import CounterReader

CONFIG = DownloadConfig(
    samples_per_shard=8,
    image_px=32,
    min_image_px=16,
    timeout_s=1.0,
    deadline_s=1.5,
    max_bytes=100_000,
    retries=1,
    politeness={"retry_wait_s": 0.01},
    passes=1,
    allowed_networks=("127.0.0.1/32",),
)
FAULTS = {
    "missing": Outcome.NOT_FOUND,
    "html": Outcome.NOT_AN_IMAGE_TYPE,
    "garbage": Outcome.UNDECODABLE,
    "tiny": Outcome.TOO_SMALL,
    "noai": Outcome.OPTED_OUT,
    "huge": Outcome.TOO_MANY_BYTES,
    "drip": Outcome.DEADLINE,
    "short": Outcome.INCOMPLETE,
}
LAION_ROWS, COYO_ROWS = 45, 21


def write_rows(path: Path, source: str, urls: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    uids = [hashlib.md5(f"{source} {url}".encode()).hexdigest() for url in urls]
    table = pa.table(
        {
            "uid": uids,
            "source": [source] * len(urls),
            "url": urls,
            "caption": [f'picture "{number}" of {source} – ü' for number in range(len(urls))],
            "original_id": [str(number) for number in range(len(urls))],
            "similarity": pa.array(
                [0.3 if n % 2 else None for n in range(len(urls))], pa.float64()
            ),
            "width_hint": pa.array(range(len(urls)), pa.int64()),
        }
    )
    pq.write_table(table, path)


def write_merge(folder: Path, web) -> Path:
    laion = [web.url(f"slow/{number}.jpg") for number in range(LAION_ROWS - len(FAULTS))]
    laion[3:3] = [web.url(fault) for fault in FAULTS]
    write_rows(folder / "laion2b" / "part-00000.parquet", "laion2b", laion)
    coyo = [web.url(f"slow/{number}.jpg") for number in range(100, 100 + COYO_ROWS)]
    write_rows(folder / "coyo700m" / "part-00000.parquet", "coyo700m", coyo)
    return folder


def digests(out: Path, *suffixes: str) -> dict[str, str]:
    files = [path for path in (out / "shards").iterdir() if path.suffix in suffixes]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def is_left(out: Path) -> bool:
    """Whether any process mentions the folder in its command line."""
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(out).encode() in command.read_bytes():
                return True
        except OSError:
            continue
    return False


def eventually(condition: Callable[[], bool], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


@dataclass
class Run:
    merged: Path
    out: Path
    made: Made
    reports: list[tuple[float, float, str]]


@pytest.fixture(scope="module")
def run(web, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One download that nothing interrupts."""
    merged = write_merge(tmp_path_factory.mktemp("merged"), web)
    out = tmp_path_factory.mktemp("whole")
    reports: list[tuple[float, float, str]] = []
    made = download_images(
        CONFIG,
        merged,
        out,
        Crew(1, 4),
        lambda done, total, detail="": reports.append((done, total, detail)),
    )
    return Run(merged, out, made, reports)


def test_every_row_is_accounted_for(run: Run) -> None:
    counts = run.made.counts
    assert counts["rows"] == LAION_ROWS + COYO_ROWS
    assert counts["samples"] == LAION_ROWS + COYO_ROWS - len(FAULTS)
    assert {key for key in counts if key.startswith("failed.")} == {
        f"failed.{outcome.value}" for outcome in FAULTS.values()
    }
    assert all(counts[f"failed.{outcome.value}"] == 1 for outcome in FAULTS.values())
    assert counts["coyo700m.samples"] == counts["coyo700m.rows"] == COYO_ROWS
    assert json.loads((run.out / "report.json").read_text())["sources"]["laion2b"]["rows"] == 45


def test_shards_never_mix_sources_and_keep_what_the_merge_knew(run: Run) -> None:
    shards = sorted((run.out / "shards").glob("*.tar"))
    assert len(shards) == run.made.counts["shards"] == 3 + 6
    per_source: dict[str, list[str]] = {}
    for shard in shards:
        samples = list(read_samples(shard))
        (source,) = {sample.record["source"] for sample in samples}
        per_source.setdefault(source, []).extend(sample.record["uid"] for sample in samples)
    planned = pq.read_table(run.merged / "coyo700m" / "part-00000.parquet")["uid"].to_pylist()
    assert per_source["coyo700m"] == planned  # in the order of the rows, not of the network
    sample = next(iter(read_samples(shards[0])))
    assert sample.caption == 'picture "0" of coyo700m – ü'
    assert sample.flaw is None
    assert sample.record["original_id"] == "0"
    assert sample.record["similarity"] is None
    assert (sample.record["width"], sample.record["height"]) == (43, 32)


def test_only_the_artifacts_files_are_left(run: Run) -> None:
    kept = {path for path in run.made.bulk if path.parent.name == "shards"}
    assert set((run.out / "shards").iterdir()) == kept
    assert not (run.out / ".work").exists()
    assert not is_left(run.out)


def test_progress_ends_at_the_number_of_rows(run: Run) -> None:
    done, total, detail = run.reports[-1]
    assert done == total == LAION_ROWS + COYO_ROWS
    assert detail == "58 images"
    assert any("fetched (" in detail and "URLs/s" in detail for _, _, detail in run.reports)


def test_a_second_call_downloads_nothing(run: Run, web) -> None:
    before = web.hits.total()
    again = download_images(CONFIG, run.merged, run.out, Crew(1, 4), lambda *_: None)
    assert web.hits.total() == before
    assert again.counts == run.made.counts


def test_other_options_in_the_same_folder_are_refused(run: Run) -> None:
    other = CONFIG.model_copy(update={"samples_per_shard": 4})
    with pytest.raises(InputError, match="other rows or with other options"):
        download_images(other, run.merged, run.out, Crew(1, 4), lambda *_: None)


@pytest.mark.parametrize("is_at_url", [False, True], ids=["in a folder", "at a URL"])
def test_kill_9_of_the_flow_then_of_a_downloader_gives_the_same_bytes(
    run: Run, tmp_path: Path, is_at_url: bool
) -> None:
    out, stored = tmp_path / "killed/download/d", tmp_path / "store/download/d"
    if is_at_url:
        open_working_copy(f"file://{tmp_path}/store", tmp_path / "killed", 1e9)
    out.mkdir(parents=True)
    code = (
        "import sys; from pathlib import Path\n"
        "from tasks.download.config import Crew, DownloadConfig\n"
        "from tasks.download.download import download_images\n"
        "config = DownloadConfig.model_validate_json(sys.argv[1])\n"
        "merged, out = map(Path, sys.argv[2:])\n"
        "download_images(config, merged, out, Crew(1, 1), lambda *_: None)\n"
    )
    arguments = [CONFIG.model_dump_json(), str(run.merged), str(out)]
    checkout = Path(download_module.__file__).parents[2]
    flow = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=checkout)
    shards = out / "shards"
    assert eventually(lambda: len(list(shards.glob("*_stats.json"))) >= 2, within_s=120)
    flow.kill()
    flow.wait()
    assert eventually(lambda: not is_left(out), within_s=20)
    finished = {path.name: path.stat().st_mtime_ns for path in shards.glob("*_stats.json")}
    assert len(list(shards.glob("*.tar"))) < run.made.counts["shards"]
    # what a kill in the middle of writing leaves, wherever this one happened to hit
    (shards / "000008.tar").write_bytes((run.out / "shards" / "000008.tar").read_bytes()[:3000])
    (shards / "000008.parquet").write_bytes(b"")
    (shards / "000007_stats.json").write_text("{")

    killed: list[int] = []

    def kill_a_downloader(done: float, total: float, detail: str = "") -> None:
        counters = out / ".work" / "counters"
        busy = CounterReader(counters).read_counts().busy if not killed else ()
        for process in busy:
            killed.append(process)
            os.kill(process, signal.SIGKILL)

    made = download_images(CONFIG, run.merged, out, Crew(1, 2), kill_a_downloader)
    assert killed
    assert not is_left(out)
    assert made.counts == run.made.counts
    moved = digests(stored, ".tar") if is_at_url else {}
    assert bool(moved) == is_at_url
    assert moved.keys().isdisjoint(digests(out, ".tar"))
    assert moved | digests(out, ".tar", ".parquet") == digests(run.out, ".tar", ".parquet")
    again = {path.name: path.stat().st_mtime_ns for path in shards.glob("*_stats.json")}
    redone = [name for name, written in finished.items() if again[name] != written]
    assert redone == []


def test_a_shard_that_contradicts_its_counts_is_broken(run: Run, tmp_path: Path) -> None:
    for path in (run.out / "shards").glob("000000*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    planned = PlannedShard(0, "coyo700m", 8)
    assert check_shard(tmp_path, planned).outcomes[Outcome.SUCCESS] == 8
    with pytest.raises(BrokenShard, match="9 rows planned, 8 rows in its statistics"):
        check_shard(tmp_path, PlannedShard(0, "coyo700m", 9))
    with tarfile.open(tmp_path / "000000.tar", "w"):
        pass
    with pytest.raises(BrokenShard, match="0 samples in its tar"):
        check_shard(tmp_path, planned)


def test_a_checked_shard_is_not_read_again_until_its_files_change(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for path in (run.out / "shards").glob("000000*"):
        (folder / path.name).write_bytes(path.read_bytes())
    planned, path = PlannedShard(0, "coyo700m", 8), tmp_path / "checked.jsonl"
    first = Ledger(path, folder).check_planned(planned)
    with path.open("a") as file:
        file.write('{"shard": "0000')  # a kill in the middle of a line
    tar = folder / "000000.tar"
    content, stat = tar.read_bytes(), tar.stat()
    tar.write_bytes(bytes(len(content)))
    os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert Ledger(path, folder).check_planned(planned) == first, "same sizes and times: not opened"
    os.utime(tar)
    with pytest.raises(BrokenShard):
        Ledger(path, folder).check_planned(planned)


def test_a_shard_is_opened_where_it_was_made_and_whoever_counts_only_compares_its_files(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[PlannedShard] = []
    monkeypatch.setattr(shards, "check_shard", lambda folder, planned: opened.append(planned))
    made = download_images(CONFIG, run.merged, tmp_path, Crew(1, 4), lambda *_: None)
    assert made.counts == run.made.counts
    assert opened == []


def test_too_few_successes_are_refused_and_what_did_well_is_kept(run: Run, tmp_path: Path) -> None:
    strict = CONFIG.model_copy(update={"min_success_rate": 0.95})
    (tmp_path / "shards").mkdir()
    for path in (run.out / "shards").iterdir():
        (tmp_path / "shards" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(InputError, match=r"only 58 of 66 URLs gave an image.*1 not_found"):
        download_images(strict, run.merged, tmp_path, Crew(1, 4), lambda *_: None)
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 9 - 2  # faults are in two shards


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "merged" / "laion2b" / "part-00000.parquet"
    write_rows(path, "laion2b", ["http://127.0.0.1:9/x.jpg"] * 20)
    return path


def test_shards_are_planned_as_img2dataset_numbers_them(small: Path) -> None:
    write_rows(small.with_name("part-00001.parquet"), "laion2b", ["http://127.0.0.1:9/y"] * 8)
    plan = plan_download(small.parents[1], CONFIG)
    assert [(shard.name, shard.rows) for shard in plan.shards] == [
        ("000000", 8),
        ("000001", 8),
        ("000002", 4),
        ("000003", 8),
    ]
    assert plan.extra_columns == ("uid", "source", "original_id", "similarity", "width_hint")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns(["uid"]), "no column 'uid'"),
        (lambda t: t.slice(0, 0), "holds no rows"),
        (
            lambda t: t.append_column("width", t["width_hint"]),
            "column 'width' has the name of one that the download adds",
        ),
        (
            lambda t: t.append_column("seen", pa.array([0] * t.num_rows, pa.timestamp("ms"))),
            r"column 'seen' is timestamp\[ms\]",
        ),
    ],
)
def test_unusable_metadata_are_one_sentence(
    small: Path, change: Callable[[pa.Table], pa.Table], message: str
) -> None:
    pq.write_table(change(pq.read_table(small)), small)
    with pytest.raises(InputError, match=message):
        plan_download(small.parents[1], CONFIG)


def test_a_hash_column_that_is_not_there_is_named(small: Path) -> None:
    wrong = CONFIG.model_copy(update={"hash_column": "md5sum"})
    with pytest.raises(InputError, match=r"no column 'md5sum': set download\.hash_column to"):
        plan_download(small.parents[1], wrong)


def test_an_unreadable_parquet_is_named(small: Path) -> None:
    small.write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"part-00000\.parquet cannot be read as parquet"):
        plan_download(small.parents[1], CONFIG)


def test_a_disk_that_is_too_small_is_named_before_anything_is_fetched(
    small: Path, tmp_path: Path
) -> None:
    wide = CONFIG.model_copy(update={"image_px": 10**8})
    with pytest.raises(InputError, match="GB free: free some space"):
        download_images(wide, small.parents[1], tmp_path, Crew(1, 4), lambda *_: None)


def test_too_many_threads_for_the_open_files_are_refused(small: Path, tmp_path: Path) -> None:
    threads = 10**9
    with pytest.raises(InputError, match=f"need {open_files_needed(threads)} open files"):
        download_images(CONFIG, small.parents[1], tmp_path, Crew(1, threads), lambda *_: None)
