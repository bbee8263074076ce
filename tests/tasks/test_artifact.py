import errno
import json
import multiprocessing
import time
from pathlib import Path

import pytest

from evaclip_model.config import Config
from evaclip_model.errors import InputError
from tasks.artifacts.artifact import (
    BULK,
    MANIFEST,
    Address,
    Made,
    Stage,
    fingerprint_files,
    produce_artifact,
    read_artifact,
    read_bulk,
    sha256_of,
)


class Wanted(Config):
    number: int = 1
    memory: int = 2


STAGE = Stage("count", 1, tools=("pydantic",), ignores=("memory",))


def address(root: Path, **fields: int) -> Address:
    return Address.of(root, STAGE, Wanted(**fields), {"from": "abc"})


def make_number(out: Path) -> Made:
    (out / "number.txt").write_text("1")
    return Made({"numbers": 1}, (out / "number.txt",))


def test_an_artifact_is_made_once_and_found_afterwards(tmp_path: Path) -> None:
    made = produce_artifact(address(tmp_path), make_number)
    again = produce_artifact(address(tmp_path), lambda out: pytest.fail("made twice"))
    assert made == again == read_artifact(made.folder)
    assert made.files["number.txt"]["size"] == 1
    assert made.parents == {"from": "abc"}


def test_the_digest_hears_config_parents_and_version_but_not_ignored_settings(
    tmp_path: Path,
) -> None:
    base = address(tmp_path).digest
    assert address(tmp_path, memory=9).digest == base
    assert address(tmp_path, number=9).digest != base
    assert Address.of(tmp_path, STAGE, Wanted(), {"from": "abd"}).digest != base
    assert Address.of(tmp_path, Stage("count", 2), Wanted(), {"from": "abc"}).digest != base


def test_without_a_manifest_the_stage_runs_again(tmp_path: Path) -> None:
    def dies(out: Path) -> Made:
        (out / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        produce_artifact(address(tmp_path), dies)
    assert not address(tmp_path).is_finished
    assert produce_artifact(address(tmp_path), make_number).counts == {"numbers": 1}


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    def fills(out: Path) -> Made:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InputError, match=r"the disk is full at .*what is finished is kept"):
        produce_artifact(address(tmp_path), fills)


def hold(where: Address, ready: "multiprocessing.Event", done: "multiprocessing.Event") -> None:
    def slowly(out: Path) -> Made:
        ready.set()
        done.wait(20)
        return Made({}, ())

    produce_artifact(where, slowly)


def test_two_runs_do_not_make_the_same_artifact_and_a_killed_one_frees_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(address(tmp_path), ready, done))
    other.start()
    assert ready.wait(10)
    with pytest.raises(InputError, match="another run is making"):
        produce_artifact(address(tmp_path), make_number)
    other.kill()
    other.join()
    assert produce_artifact(address(tmp_path), make_number).counts == {"numbers": 1}


def test_bulk_files_are_listed_by_size_and_never_read(tmp_path: Path) -> None:
    def make(out: Path) -> Made:
        (out / "shards").mkdir()
        for name in ("0.tar", "1.tar"):
            with (out / "shards" / name).open("wb") as file:
                file.truncate(1 << 40)  # a hole: nobody could hash it in a day
        (out / "report.json").write_text("{}")
        return Made({}, (out / "report.json",), bulk=tuple((out / "shards").iterdir()))

    made = produce_artifact(address(tmp_path), make)
    assert set(made.files) == {"report.json", BULK}
    assert made.files[BULK]["sha256"] == sha256_of(made.folder / BULK)
    shards = made.folder / "shards"
    assert read_bulk(made.folder) == {shards / "0.tar": 1 << 40, shards / "1.tar": 1 << 40}
    assert read_bulk(produce_artifact(address(tmp_path, number=2), make_number).folder) is None


def test_many_files_keep_their_own_hashes(tmp_path: Path) -> None:
    def make(out: Path) -> Made:
        for number in range(40):
            (out / f"{number}.bin").write_bytes(bytes([number]) * (number * 50_000))
        return Made({}, tuple(out.glob("*.bin")))

    made = produce_artifact(address(tmp_path), make)
    assert len(made.files) == 40
    for name, said in made.files.items():
        path = made.folder / name
        assert said == {"size": path.stat().st_size, "sha256": sha256_of(path)}


def test_a_damaged_list_of_bulk_files_is_named(tmp_path: Path) -> None:
    made = produce_artifact(address(tmp_path), make_number)
    (made.folder / BULK).write_text('{"path": "0.tar"}\n')
    with pytest.raises(InputError, match=r"bulk\.jsonl cannot be read"):
        read_bulk(made.folder)


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    made = produce_artifact(address(tmp_path), make_number)
    (made.folder / MANIFEST).write_text("{")
    with pytest.raises(InputError, match=r"manifest.json cannot be read"):
        read_artifact(made.folder)
    (made.folder / MANIFEST).write_text(json.dumps({"kind": "count"}))
    with pytest.raises(InputError, match="'digest' is missing"):
        read_artifact(made.folder)


def test_a_fingerprint_hears_names_sizes_and_ends(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a").write_bytes(b"x" * 10)
    first = fingerprint_files(folder)
    time.sleep(0.01)
    (folder / "a").write_bytes(b"x" * 10)
    assert fingerprint_files(folder) == first
    (folder / "a").write_bytes(b"x" * 9 + b"y")
    assert fingerprint_files(folder) != first
