"""Verification of small real shards: what is found, what is left out, and why."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from evaclip_model.errors import InputError
from tasks.artifacts.artifact import BULK, Made, sha256_of
from tasks.index.sample_index import COLUMNS, SampleIndex, read_verdicts
from tasks.process.launch import RankLaunch
from tasks.progress import report_nothing
from tasks.verify.config import VerifyConfig
from tasks.verify.verify import verify_shards
from tests.evaclip_model.hostile_images import jpeg_of_many_scans
from tests.tasks.process.fake_slurm import FakeSlurm

CONFIG = VerifyConfig(min_image_px=8, max_pixels=10_000, max_bad_share=0.3)


def encoded(size: tuple[int, int] = (20, 12), kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 80).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def sample(number: int, source: str = "laion2b", **changes: object) -> dict[str, object]:
    record = {"uid": f"{source}-{number}", "source": source}
    return {
        "__key__": f"{number:06d}",
        "jpg": encoded(),
        "txt": f"drawing {number}",
        "json": json.dumps(record),
        **changes,
    }


def write_shard(downloaded: Path, name: str, samples: list[dict[str, object]]) -> Path:
    (downloaded / "shards").mkdir(parents=True, exist_ok=True)
    path = downloaded / "shards" / f"{name}.tar"
    with webdataset.TarWriter(str(path)) as tar:
        for one in samples:
            tar.write(one)
    return path


def verify(downloaded: Path, out: Path, config: VerifyConfig = CONFIG) -> Made:
    return verify_shards(config, downloaded, out, 2, lambda *_: None)


@pytest.fixture
def downloaded(tmp_path: Path) -> Path:
    folder = tmp_path / "download" / "abc"
    write_shard(folder, "000000", [sample(number) for number in range(5)])
    write_shard(folder, "000001", [sample(number, "coyo700m") for number in range(3)])
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "verify" / "def"


def test_a_verdict_names_a_whole_shard_by_relative_path_and_digest(
    downloaded: Path, out: Path
) -> None:
    made = verify(downloaded, out)
    shards = [verdict.shard for verdict in read_verdicts(out)]
    assert [shard.path for shard in shards] == [
        "../../download/abc/shards/000000.tar",
        "../../download/abc/shards/000001.tar",
    ]
    for shard in shards:
        assert sha256_of(out / shard.path) == shard.sha256
        assert (out / shard.path).stat().st_size == shard.bytes
    assert [(shard.source, shard.samples) for shard in shards] == [("laion2b", 5), ("coyo700m", 3)]
    assert made.counts["samples"] == 8
    assert {"checked.json", "report.json", "by_uid.parquet"} <= {file.name for file in made.files}


def test_the_index_has_every_sample_by_shard_and_place(downloaded: Path, out: Path) -> None:
    image = encoded()
    record = {"uid": "u", "source": "laion2b", "url": "http://a.example/1", "sha256": "a" * 64}
    write_shard(downloaded, "000000", [sample(0), sample(1, jpg=image, json=json.dumps(record))])
    verify(downloaded, out)
    (table,) = SampleIndex(out).iterate_chunks(
        "row", "shard", "place", "key", "uid", "url", "sha256"
    )
    assert table.slice(1, 1).to_pylist() == [
        {"row": 1, "shard": 0, "place": 1, "key": "000001"}
        | {name: record[name] for name in ("uid", "url", "sha256")}
    ]
    assert [row["shard"] for row in table.to_pylist()] == [0, 0, 1, 1, 1]
    (hashes,) = SampleIndex(out).iterate_chunks("stored_sha256", "phash", "flaw")
    assert hashes["stored_sha256"][1].as_py() == hashlib.sha256(image).hexdigest()
    assert hashes["phash"].null_count == 0
    assert hashes["flaw"].null_count == 5


def damaged_jpeg() -> bytes:
    """A JPEG whose content libjpeg can only guess in places."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()[:700] + bytes(20) + file.getvalue()[720:]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"jpg": b"\xff\xd8 nothing"}, "undecodable"),
        ({"jpg": encoded((60, 60))[:-300]}, "undecodable"),
        ({"jpg": damaged_jpeg()}, "damaged"),
        ({"jpg": jpeg_of_many_scans(64, 51_000)}, "too_costly"),
        ({"jpg": encoded((20, 4))}, "too_small"),
        ({"jpg": encoded((200, 100))}, "too_many_pixels"),
        ({"txt": "  \n"}, "empty_caption"),
        ({"json": json.dumps({"uid": "laion2b-0", "source": "laion2b"})}, "repeated_uid"),
        ({"png": encoded()}, "several_images"),
        ({"txt": b"caf\xe9"}, "caption_not_utf8"),
        ({"json": b'{"x":' + b"[" * 100_000}, "unreadable_record"),
    ],
)
def test_a_bad_sample_is_counted_and_its_shard_kept(
    downloaded: Path, out: Path, changes: dict[str, object], reason: str
) -> None:
    write_shard(downloaded, "000000", [*map(sample, range(4)), sample(4, **changes)])
    made = verify(downloaded, out)
    assert made.counts[f"bad.{reason}"] == 1
    assert made.counts["shards"] == 2
    assert [verdict.stored for verdict in read_verdicts(out)] == [5, 3]
    (table,) = SampleIndex(out).iterate_chunks("flaw")
    assert table["flaw"].to_pylist() == [None] * 4 + [reason] + [None] * 3


def test_a_shard_with_too_many_bad_samples_is_left_out(downloaded: Path, out: Path) -> None:
    bad = [sample(number, jpg=b"x") for number in range(2)]
    write_shard(downloaded, "000000", [*bad, sample(2), sample(3)])
    made = verify(downloaded, out)
    assert made.counts["shards_left_out"] == 1
    report = json.loads((out / "report.json").read_text())
    assert report["left_out"] == {
        "../../download/abc/shards/000000.tar": "2 of its 4 samples are bad (2 undecodable)"
    }


@pytest.mark.parametrize("kind", ["truncated", "empty", "mixed"])
def test_a_broken_shard_is_left_out_with_its_reason(downloaded: Path, out: Path, kind: str) -> None:
    path = downloaded / "shards" / "000000.tar"
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:700])
    elif kind == "empty":
        write_shard(downloaded, "000000", [])
    else:
        write_shard(downloaded, "000000", [sample(0), sample(1, "coyo700m")])
    made = verify(downloaded, out)
    assert (made.counts["shards"], made.counts["shards_left_out"]) == (1, 1)
    expected = {
        "truncated": "not a whole tar",
        "empty": "no samples",
        "mixed": "mixes the sources coyo700m, laion2b",
    }
    (reason,) = json.loads((out / "report.json").read_text())["left_out"].values()
    assert expected[kind] in reason


def test_no_usable_shard_is_one_sentence(downloaded: Path, out: Path) -> None:
    for path in (downloaded / "shards").iterdir():
        path.write_bytes(b"not a tar")
    with pytest.raises(InputError, match=r"none of the 2 shards .* can be trained on"):
        verify(downloaded, out)
    assert not (out / "checked.json").exists()


def test_no_shard_at_all_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no shards"):
        verify(tmp_path / "nothing", tmp_path / "out")


def test_a_stopped_verification_goes_on_where_it_was(downloaded: Path, out: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: float, total: float, detail: str = "") -> None:
        if detail == "indexing":
            raise Stop

    with pytest.raises(Stop):
        verify_shards(CONFIG, downloaded, out, 1, stop)
    assert not (out / "checked.json").exists()
    first, second = sorted((out / ".tables").glob("*.parquet"))
    second.unlink()
    first_tar = downloaded / "shards" / f"{first.stem}.tar"
    first_tar.write_bytes(b"looked at already, so that nobody opens it")
    made = verify(downloaded, out)
    assert made.counts["samples"] == 8
    assert not (out / ".tables").exists(), "the index has it all"
    assert verify(downloaded, out) == made, "killed before the manifest was written"


def write_list(downloaded: Path, **sizes: int) -> None:
    """The list of bulk files that a finished download has; `sizes` are other than they are."""
    paths = sorted((downloaded / "shards").iterdir())
    lines = [
        {"path": f"shards/{path.name}", "size": sizes.get(f"n{path.stem}", path.stat().st_size)}
        for path in paths
    ]
    (downloaded / BULK).write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def test_a_shard_that_the_download_lists_and_nobody_has_any_more_is_missed(
    downloaded: Path, out: Path
) -> None:
    write_list(downloaded)
    (downloaded / "shards" / "000000.tar").unlink()
    write_shard(downloaded, "000007", [sample(7)])
    made = verify(downloaded, out)
    assert (made.counts["shards"], made.counts["shards_left_out"]) == (1, 1)
    lost, whole = read_verdicts(out)
    assert "000000.tar" in str(lost.left_out)
    assert "No such file" in str(lost.left_out)
    assert whole.path.endswith("000001.tar"), "what the list does not name is nobody's"


def test_a_shard_of_another_size_than_was_downloaded_is_left_out(
    downloaded: Path, out: Path
) -> None:
    write_list(downloaded, n000001=99)
    verify(downloaded, out)
    assert "bytes, but 99 when it was listed" in str(read_verdicts(out)[1].left_out)


VERIFY = """
import sys
from pathlib import Path
from tasks.verify.config import VerifyConfig
from tasks.verify.verify import verify_shards
from tests.evaclip_model.hostile_images import jpeg_of_many_scans
verify_shards(VerifyConfig(), Path(sys.argv[1]), Path(sys.argv[2]), 2, lambda *_: None)
"""


def start(downloaded: Path, out: Path) -> subprocess.Popen[bytes]:
    """A verification in a process of its own, as a flow's worker is."""
    return subprocess.Popen([sys.executable, "-c", VERIFY, str(downloaded), str(out)])


def test_killed_in_the_middle_it_looks_at_no_finished_shard_again(
    tmp_path: Path, out: Path
) -> None:
    downloaded, shards, image = tmp_path / "download", 8, encoded((640, 480))
    for number in range(shards):
        held = [sample(100 * number + place, jpg=image) for place in range(40)]
        write_shard(downloaded, f"{number:06d}", held)
    undisturbed = tmp_path / "verify" / "undisturbed"
    verify(downloaded, undisturbed, VerifyConfig())

    process = start(downloaded, out)
    until = time.monotonic() + 100
    while len(kept := list((out / ".tables").glob("*.parquet"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert len(kept) < shards, "nothing was left to do"
    for table in kept:  # who looks at a finished shard again finds none
        (downloaded / "shards" / f"{table.stem}.tar").write_bytes(b"gone")
    verify(downloaded, out, VerifyConfig())
    assert read_verdicts(out) == read_verdicts(undisturbed)
    for one, other in zip(
        SampleIndex(out).iterate_chunks(*COLUMNS.names),
        SampleIndex(undisturbed).iterate_chunks(*COLUMNS.names),
        strict=True,
    ):
        assert one.equals(other)


@pytest.mark.slow
def test_the_ranks_of_a_slurm_job_of_two_machines_one_killed_find_what_one_process_does(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloaded, image = tmp_path / "download", encoded((640, 480))
    for number in range(12):
        held = [sample(100 * number + place, jpg=image) for place in range(40)]
        write_shard(downloaded, f"{number:06d}", held)
    alone = tmp_path / "verify" / "alone"
    expected = verify_shards(VerifyConfig(), downloaded, alone, 1, report_nothing)
    slurm = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{slurm.bin}:{os.environ['PATH']}")
    monkeypatch.setattr("tasks.process.launch.CLUSTER_LOOK_S", 0.2)
    killed: list[int] = []

    def kill_one(done: float, total: float, detail: str = "") -> None:
        words = ["-m", "tasks.verify.verify", str(out / "job.json")]
        for one in psutil.process_iter(["cmdline"]) if done and not killed else ():
            if (one.info["cmdline"] or [])[1:] == words and not killed:
                one.kill()
                killed.append(one.pid)

    try:
        launch = RankLaunch(launcher="slurm", ranks=2, nodes=2)
        made = verify_shards(VerifyConfig(), downloaded, out, 1, kill_one, launch)
    finally:
        slurm.close()
    assert killed, "nobody was killed"
    assert made.counts == expected.counts
    for one, other in zip(sorted(made.files), sorted(expected.files), strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert "--gpus" not in (out / "job.sbatch").read_text()


def write_record(downloaded: Path, name: str, statuses: list[str], successes: int) -> None:
    """What img2dataset writes beside a tar."""
    keys = [f"{number:06d}" for number in range(len(statuses))]
    table = pa.table({"key": keys, "status": statuses})
    pq.write_table(table, downloaded / "shards" / f"{name}.parquet")
    stats = {"count": len(statuses), "successes": successes}
    (downloaded / "shards" / f"{name}_stats.json").write_text(json.dumps(stats))


def test_a_shard_that_agrees_with_its_table_and_statistics_is_kept(
    downloaded: Path, out: Path
) -> None:
    write_record(downloaded, "000000", ["success"] * 5 + ["failed_to_download"], 5)
    assert verify(downloaded, out).counts["shards_left_out"] == 0


@pytest.mark.parametrize(
    ("statuses", "successes", "reason"),
    [
        (["success"] * 5, 6, "its statistics count 6 samples, its table 5, and the tar holds 5"),
        (["success"] * 4 + ["failed_to_download"], 4, "its table 4, and the tar holds 5"),
        (["failed_to_download"] + ["success"] * 5, 5, "the tar holds 5, 4 of them the table's"),
    ],
)
def test_a_shard_that_contradicts_its_table_or_statistics_is_left_out(
    downloaded: Path, out: Path, statuses: list[str], successes: int, reason: str
) -> None:
    write_record(downloaded, "000000", statuses, successes)
    assert verify(downloaded, out).counts["shards_left_out"] == 1
    assert reason in str(read_verdicts(out)[0].left_out)


def test_a_table_without_statistics_is_an_unfinished_shard(downloaded: Path, out: Path) -> None:
    write_record(downloaded, "000000", ["success"] * 5, 5)
    (downloaded / "shards" / "000000_stats.json").unlink()
    verify(downloaded, out)
    assert "its table or statistics cannot be read" in str(read_verdicts(out)[0].left_out)


def test_a_sample_that_lacks_an_image_or_a_caption_costs_itself(
    downloaded: Path, out: Path
) -> None:
    lacking = [
        {name: value for name, value in sample(5).items() if name != "jpg"},
        {name: value for name, value in sample(6).items() if name != "txt"},
    ]
    write_shard(downloaded, "000000", [*map(sample, range(5)), *lacking])
    made = verify(downloaded, out, VerifyConfig(max_bad_share=0.5))
    assert (made.counts["bad.no_image"], made.counts["bad.no_caption"]) == (1, 1)
    assert made.counts["samples"] == 8


def test_records_and_names_that_no_table_can_hold_are_written_without_what_is_broken(
    downloaded: Path, out: Path
) -> None:
    odd = json.dumps({"uid": "u", "source": "laion2b", "url": "http://a.example/\ud83d"})
    path = write_shard(downloaded, "000000", [sample(0), sample(1, json=odd)])
    with tarfile.open(path, "a", format=tarfile.USTAR_FORMAT, errors="surrogateescape") as tar:
        for ending, content in (("jpg", encoded()), ("txt", b"text")):
            member = tarfile.TarInfo(f"caf\udce9.{ending}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert verify(downloaded, out).counts["samples"] == 3 + 3
    (table,) = SampleIndex(out).iterate_chunks("key", "url", "source")
    assert table["url"][1].as_py() == "http://a.example/?"
    assert table["key"][2].as_py() == "caf?"


def test_two_folders_of_shards_with_the_same_names_are_told_apart(
    tmp_path: Path, out: Path
) -> None:
    for source in ("a", "b"):
        write_shard(tmp_path / "in" / source, "000000", [sample(n, source) for n in range(3)])
    assert verify(tmp_path / "in", out).counts["samples"] == 6
    (table,) = SampleIndex(out).iterate_chunks("uid")
    assert len(set(table["uid"].to_pylist())) == 6
