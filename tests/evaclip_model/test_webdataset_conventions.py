"""Odd but real shards: what is read of them here is what webdataset itself reads."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest
import webdataset
from hypothesis import HealthCheck, example, given, settings, strategies as st
from torch.utils.data import DataLoader
from webdataset.tariterators import tarfile_samples

from evaclip_model.errors import InputError
from evaclip_model.reading import open_webdataset
from evaclip_model.reading.samples import (
    Shard,
    ShardManifest,
    group_members,
    is_sample_file,
    read_samples,
    read_tombstones,
    skip_tombstones,
)
from evaclip_model.reading.tar_file import BrokenTar, TarReader
from tests.evaclip_model.test_samples import stored, write_tar

Found = list[tuple[str, dict[str, bytes]]]
FORMATS = [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]
LONG = "a/folder/" * 20
ODD: dict[str, list[str]] = {
    "plain": ["0.jpg", "0.txt", "0.json", "1.jpg", "1.txt", "1.json"],
    "members in several orders": ["0.json", "0.jpg", "0.txt", "1.txt", "1.json", "1.jpg"],
    "missing parts": ["0.jpg", "1.txt", "1.jpg", "2.json"],
    "a key comes back later": ["0.jpg", "1.jpg", "0.txt", "1.txt"],
    "dots behind the key": ["0.left.jpg", "0.right.jpg", "0.txt", "host.example.jpg"],
    "dots in folders": ["v1.0/0.jpg", "v1.0/0.txt", "v1.1/0.jpg", "./0.jpg", "../0.jpg"],
    "the same name in two folders": ["a/0.jpg", "a/0.txt", "b/0.jpg", "b/0.txt"],
    "capitals": ["0.JPG", "0.Txt", "0.JSON", "A.jpg", "a.jpg"],
    "no extension in between": ["0.jpg", "README", "folder/LICENSE", "0.txt"],
    "hidden files": [".hidden", ".jpg", "a/.jpg", "a/.b.jpg", "0.jpg"],
    "a dot at the end": ["0.", "0.jpg", "1."],
    "notes about the shard": [
        "__meta__",
        "__meta__/0.jpg",
        "__x__",
        "0.jpg",
        "a/__x__",
        "__x__y.jpg",
    ],
    "keys with underscores": ["__0.jpg", "__0.txt", "_.jpg", "__.jpg", "___.jpg", "____.jpg"],
    "long names": [f"{LONG}0.jpg", f"{LONG}0.txt", f"{'x' * 99}.jpg", f"{'y' * 101}.jpg"],
    "no ASCII": ["würfel.jpg", "würfel.txt", "图片.jpg", "🎲.jpg"],
    "spaces and line ends": ["a b.jpg", "a b.txt", " .jpg", "a\nb.jpg"],
    "one name twice": ["0.jpg", "0.txt", "0.jpg"],
    "one name twice but for capitals": ["0.jpg", "0.JPG"],
    "names that webdataset uses itself": ["0.__key__", "0.jpg"],
}


def pack(path: Path, names: Sequence[str], format: int = tarfile.PAX_FORMAT) -> Path:
    """A tar of members whose content is their place and, every third time, nothing at all."""
    with tarfile.open(path, "w", format=format) as tar:
        for place, name in enumerate(names):
            data = b"" if place % 3 == 2 else b"%d" % place * (place * 700)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def read_here(path: Path) -> Found:
    with path.open("rb") as tar:
        file = tar.fileno()
        found = group_members(TarReader(file))
        return [(key, {kind: one.read(file) for kind, one in held.items()}) for key, held in found]


def read_by_webdataset(path: Path) -> Found:
    """What webdataset groups, with those members passed over that it would end with."""
    return [
        (
            sample["__key__"],
            {kind: one for kind, one in sample.items() if kind not in ("__key__", "__url__")},
        )
        for sample in tarfile_samples(
            [{"url": str(path)}],
            handler=webdataset.ignore_and_continue,
            select_files=is_sample_file,
        )
    ]


def assert_read_alike(path: Path) -> None:
    """The same samples with the same members; repeated ones are only marked here."""
    found = [
        (key, {kind: one for kind, one in parts.items() if kind != "__repeated__"})
        for key, parts in read_here(path)
    ]
    assert found == read_by_webdataset(path)


@pytest.mark.parametrize("format", FORMATS, ids=["ustar", "pax", "gnu"])
@pytest.mark.parametrize("names", ODD.values(), ids=ODD.keys())
def test_an_odd_shard_is_grouped_as_webdataset_groups_it(
    tmp_path: Path, names: list[str], format: int
) -> None:
    try:
        path = pack(tmp_path / "0.tar", names, format)
    except ValueError:
        assert format == tarfile.USTAR_FORMAT, "only the oldest format has names that do not fit"
        return
    assert_read_alike(path)


def test_two_members_of_one_name_cost_their_sample(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [stored("0"), stored("1"), stored("2")])
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("2.jpg"))
    assert [sample.flaw for sample in read_samples(path)] == [None, None, "repeated_member"]


def test_what_a_mac_adds_to_a_tar_is_passed_over(tmp_path: Path) -> None:
    names = ["d/0.jpg", "d/0.txt", "d/1.jpg", "d/1.txt"]
    added = [n for name in names for n in (name.replace("d/", "d/._"), name)]
    path = pack(tmp_path / "0.tar", ["._d", ".DS_Store", "__MACOSX/d/0.jpg", *added])
    assert [(key, sorted(parts)) for key, parts in read_here(path)] == [
        ("d/0", ["jpg", "txt"]),
        ("d/1", ["jpg", "txt"]),
    ]


PIECES = st.sampled_from(["0", "1", "a", ".", "..", "/", "__", "_", "jpg", "TXT", "é", " "])
NAMES = st.lists(PIECES, min_size=1, max_size=6).map("".join).filter(lambda name: name.strip("/"))


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(names=st.lists(NAMES, max_size=8), format=st.sampled_from(FORMATS))
@example(names=["0.jpg", "folder/", "0.txt"], format=tarfile.GNU_FORMAT)
def test_any_names_are_grouped_as_webdataset_groups_them(
    tmp_path: Path, names: list[str], format: int
) -> None:
    path = pack(tmp_path / "0.tar", names, format)
    if names:
        assert_read_alike(path)


def special(name: str, kind: bytes, **fields: object) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = kind
    for field, value in fields.items():
        setattr(member, field, value)
    return member


@pytest.mark.parametrize("format", FORMATS, ids=["ustar", "pax", "gnu"])
def test_what_is_no_file_is_passed_over_and_parts_no_sample(tmp_path: Path, format: int) -> None:
    path, data = tmp_path / "0.tar", b"x" * 700
    long = "z" * 90 if format == tarfile.USTAR_FORMAT else "z" * 200
    with tarfile.open(path, "w", format=format) as tar:
        for member in (
            special("0.jpg", tarfile.REGTYPE, size=700),
            special("folder", tarfile.DIRTYPE),
            special("0.gif", tarfile.SYMTYPE, linkname=long),
            special("0.bmp", tarfile.LNKTYPE, linkname="0.jpg"),
            special("0.pipe", tarfile.FIFOTYPE),
            special("0.txt", tarfile.AREGTYPE, size=700),
            special("0.json", tarfile.CONTTYPE, size=700),
            special(f"{long}.jpg", tarfile.SYMTYPE, linkname=long),
            special("1.jpg", tarfile.REGTYPE, size=700),
        ):
            tar.addfile(member, io.BytesIO(data) if member.size else None)
    assert read_here(path) == read_by_webdataset(path)
    assert [(key, sorted(held)) for key, held in read_here(path)] == [
        ("0", ["jpg", "json", "txt"]),
        ("1", ["jpg"]),
    ]


def test_a_link_that_claims_a_size_has_none(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.fileobj.write(
            special("0.gif", tarfile.LNKTYPE, size=5000, linkname="0.jpg").tobuf(tar.format)
        )
        tar.offset += 512
        tar.addfile(special("0.jpg", tarfile.REGTYPE, size=3), io.BytesIO(b"abc"))
    assert read_here(path) == read_by_webdataset(path) == [("0", {"jpg": b"abc"})]


def test_headers_for_the_whole_tar_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    headers = {"comment": "made for a test", "mtime": "17.25"}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers=headers) as tar:
        tar.addfile(special("0.jpg", tarfile.REGTYPE, size=3), io.BytesIO(b"abc"))
    assert read_here(path) == read_by_webdataset(path) == [("0", {"jpg": b"abc"})]


def test_a_sparse_member_is_refused_not_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(special("0.jpg", tarfile.GNUTYPE_SPARSE, size=3), io.BytesIO(b"abc"))
    with pytest.raises(BrokenTar, match="sparse"):
        read_here(path)
    sparse = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "0.jpg"}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        member = special("GNUSparseFile.0/0.jpg", tarfile.REGTYPE, size=512, pax_headers=sparse)
        tar.addfile(member, io.BytesIO(b"1\n0\n3\n".ljust(512, b"\0")))
    with pytest.raises(BrokenTar, match="sparse"):
        read_here(path)


def write_version(folder: Path) -> Path:
    """Two shards of six samples each, two of which are left out."""
    shards = []
    for number, left_out in enumerate(("1 4", "0 5")):
        keys = [f"{number}{place:02d}" for place in range(6)]
        path = write_tar(folder / f"{number}.tar", [stored(key) for key in keys])
        size = path.stat().st_size
        shards.append(
            Shard(
                **{"path": path.name, "source": "a", "samples": 4, "bytes": size},
                **{"sha256": "0" * 64, "tombstones": left_out},
            )
        )
    ShardManifest(shards=tuple(shards)).write(folder / "shards.json")
    return folder / "shards.json"


KEPT = ["000", "002", "003", "005", "101", "102", "103", "104"]


def test_one_call_opens_a_dataset_version_for_webdataset_without_what_it_leaves_out(
    tmp_path: Path,
) -> None:
    manifest = write_version(tmp_path)
    assert [sample["__key__"] for sample in open_webdataset(manifest)] == KEPT
    assert sorted(open_webdataset(manifest).shuffle(10).to_tuple("__key__")) == [
        (key,) for key in KEPT
    ]
    loader = DataLoader(open_webdataset(manifest), batch_size=None, num_workers=2)
    assert sorted(sample["__key__"] for sample in loader) == KEPT
    for shard in ShardManifest.read(manifest).shards:
        read = skip_tombstones(read_samples(tmp_path / shard.path), read_tombstones("", shard))
        assert [sample.key for sample in read] == [key for key in KEPT if key[0] == shard.path[0]]


def test_a_shard_that_is_drawn_twice_in_a_row_leaves_the_same_out(tmp_path: Path) -> None:
    drawn = islice(open_webdataset(write_version(tmp_path), resampled=True), 200)
    assert {sample["__key__"] for sample in drawn} == set(KEPT)


def test_a_shard_that_changed_since_is_not_read_by_webdataset(tmp_path: Path) -> None:
    manifest = write_version(tmp_path)
    with (tmp_path / "1.tar").open("ab") as tar:
        tar.write(b"more")
    with pytest.raises(InputError, match=r"1\.tar changed since it was verified"):
        list(open_webdataset(manifest))
