"""Members found by headers alone, against Python's tarfile, on whole and on spoilt tars."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from evaclip_model.reading.tar_file import BrokenTar, TarReader

NAMES = ["a.txt", "folder/b.jpg", "x" * 90 + ".json", "y/" * 60 + "z.txt", "é" * 120 + ".png"]


def write(path: Path, format: int, names: list[str] = NAMES) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for number, name in enumerate(names):
            data = bytes([number]) * (number * 511)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def read(path: Path, stretch_bytes: int = 0) -> list[tuple[str, bytes]]:
    with path.open("rb") as tar:
        reader = TarReader(tar.fileno())
        reader.stretch_bytes = stretch_bytes
        found = [(member, bytes(member.view_content(tar.fileno()))) for member in reader]
        assert [member.read(tar.fileno()) for member, _ in found] == [data for _, data in found]
        return [(member.name, data) for member, data in found]


def read_by_tarfile(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path, "r:") as tar:
        return [(m.name, tar.extractfile(m).read()) for m in tar if m.isfile()]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_those_that_tarfile_finds(tmp_path: Path, format: int) -> None:
    path = write(tmp_path / "0.tar", format)
    assert read(path) == read_by_tarfile(path)
    assert [name for name, _ in read(path)] == NAMES


def test_a_long_name_split_over_two_fields_is_put_together(tmp_path: Path) -> None:
    path = write(tmp_path / "0.tar", tarfile.USTAR_FORMAT, ["long/" * 30 + "name.txt", "a.txt"])
    assert read(path) == read_by_tarfile(path)


@pytest.mark.parametrize("stretch", [512, 1024, 1536, 2560, 4096, 1 << 20])
@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_stretches_of_any_length_hold_the_same(tmp_path: Path, format: int, stretch: int) -> None:
    path = write(tmp_path / "0.tar", format)
    assert read(path, stretch) == read_by_tarfile(path)


def test_stretches_may_begin_and_end_anywhere(tmp_path: Path) -> None:
    path = write(tmp_path / "0.tar", tarfile.PAX_FORMAT, [f"{n}.txt" for n in range(20)])
    found = []
    with path.open("rb") as tar:
        reader = TarReader(tar.fileno())
        for number, member in enumerate(reader):
            found.append((member.name, member.view_content(tar.fileno())))
            reader.stretch_bytes = 6000 if number % 3 else 0
    assert found == read_by_tarfile(path)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cut=st.integers(1, 9000))
def test_a_cut_tar_gives_whole_members_and_then_says_so(tmp_path: Path, cut: int) -> None:
    whole = write(tmp_path / "whole.tar", tarfile.PAX_FORMAT)
    expected, content = read(whole), whole.read_bytes()
    short = tmp_path / "short.tar"
    short.write_bytes(content[:cut])
    got = []
    with short.open("rb") as tar:
        try:
            for member in TarReader(tar.fileno()):
                got.append((member.name, member.read(tar.fileno())))
        except BrokenTar:
            pass
        else:
            assert cut % 512 == 0  # only between two members is a cut invisible
    assert got == expected[: len(got)]


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(at=st.integers(0, 10_239), to=st.integers(0, 255))
def test_a_changed_byte_never_leads_outside_the_tar(tmp_path: Path, at: int, to: int) -> None:
    content = bytearray(write(tmp_path / "whole.tar", tarfile.PAX_FORMAT).read_bytes())
    content[at % len(content)] = to
    path = tmp_path / "changed.tar"
    path.write_bytes(content)
    try:
        found = read(path)
    except BrokenTar as error:
        assert "byte" in str(error) or "extended" in str(error)
    else:
        assert len(found) <= len(NAMES)


def test_what_is_no_tar_is_named_by_its_place(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(b"<html>" * 200)
    with pytest.raises(BrokenTar, match="no header at byte 0"):
        read(path)
