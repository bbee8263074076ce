"""Centre frames: exactly decoded frame n // 2, whatever file it is in; what fails is listed."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from evaclip_model.errors import InputError
from tasks.evaluate.sets.convert.convert import Words, convert_videos
from tasks.evaluate.sets.convert.shard_writer import UnusableSourceError
from tasks.evaluate.sets.convert.videos import centre_frame, find_videos
from tasks.evaluate.sets.published_layout import open_set
from tasks.evaluate.sets.set_registry import find_set

pytest.importorskip("av")
from tests.tasks.evaluate.videos import number_of, write_video

OWN = Words(templates="none")


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("avi", "mpeg4"),
        ("avi", "libx264"),
        ("mp4", "mpeg4"),
        ("mp4", "libx264"),
        ("mov", "libx264"),
        ("mkv", "libx264"),
        ("webm", "libvpx-vp9"),
    ],
)
@pytest.mark.parametrize("frames", [1, 2, 150, 201])
def test_the_centre_is_frame_n_over_2_of_those_decoded(
    tmp_path: Path, container: str, codec: str, frames: int
) -> None:
    image, remark = centre_frame(write_video(tmp_path / f"a.{container}", frames, codec))
    assert number_of(image) == frames // 2
    assert (image.mode, remark) == ("RGB", "")


def cut(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    return path


def test_a_file_cut_short_is_used_with_a_remark_or_refused_with_a_reason(tmp_path: Path) -> None:
    image, remark = centre_frame(cut(write_video(tmp_path / "a.avi", 200), 0.5))
    assert 30 < number_of(image) < 50
    assert remark.endswith("of 200 promised frames")
    _, remark = centre_frame(cut(write_video(tmp_path / "a.mkv", 200, "libx264"), 0.5))
    assert remark.endswith("of 8.0 promised seconds")
    with pytest.raises(UnusableSourceError, match="cannot be decoded: Invalid data"):
        centre_frame(cut(write_video(tmp_path / "a.mp4", 200, "libx264"), 0.5))


def test_what_is_no_video_is_refused_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "empty.avi").write_bytes(b"")
    with pytest.raises(UnusableSourceError, match="cannot be decoded: Invalid data"):
        centre_frame(tmp_path / "empty.avi")
    (tmp_path / "text.avi").write_text("not a video\n" * 100)
    with pytest.raises(UnusableSourceError, match=r"cannot be decoded|has no video stream"):
        centre_frame(tmp_path / "text.avi")


@pytest.fixture
def ucf(tmp_path: Path) -> Path:
    """Three classes of UCF-101's names and files, two videos each."""
    for folder, name in (
        ("ApplyEyeMakeup", "ApplyEyeMakeup"),
        ("HandstandPushups", "HandStandPushups"),
        ("YoYo", "YoYo"),
    ):
        for group in (1, 2):
            path = tmp_path / "ucf" / folder / f"v_{name}_g{group:02d}_c01.avi"
            write_video(path, 20 * group)
    return tmp_path / "ucf"


def test_videos_become_a_set_of_their_centre_frames(ucf: Path, tmp_path: Path) -> None:
    made = convert_videos(ucf, tmp_path / "set", OWN)
    found = open_set("ucf", made.folder, "classification", ("{c}",))
    assert found.classnames == ("Apply Eye Makeup", "Hand Stand Pushups", "Yo Yo")
    assert [sample.label for sample in found.samples] == [0, 0, 1, 1, 2, 2]
    numbers = [number_of(Image.open(io.BytesIO(sample.image.read()))) for sample in found.samples]
    assert numbers == [10, 20] * 3


def test_classes_of_other_folders_are_called_as_they_are(tmp_path: Path) -> None:
    for name in ("air drumming", "playing_ping_pong"):
        write_video(tmp_path / "in" / name / "a.mp4", 10, "libx264")
    made = convert_videos(tmp_path / "in", tmp_path / "set", OWN)
    assert made.classnames == ("air drumming", "playing ping pong")


def test_only_listed_videos_are_taken_and_missing_ones_are_counted(
    ucf: Path, tmp_path: Path
) -> None:
    listing = tmp_path / "testlist01.txt"
    listing.write_text(
        "YoYo/v_YoYo_g02_c01.avi\nApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi 1\n"
        "YoYo/v_YoYo_g07_c01.avi\n"
    )
    made = convert_videos(ucf, tmp_path / "set", OWN, listing)
    assert made.images == 2
    assert made.failures == (("v_YoYo_g07_c01", "is in the list and not in the folders"),)
    samples = open_set("ucf", made.folder, "classification", ("{c}",)).samples
    assert [sample.label for sample in samples] == [2, 0]


KINETICS = (
    "label,youtube_id,time_start,time_end,split\n"
    "zumba,x,100,110,validate\nabseiling,aB-1_c,3,13,validate\nabseiling,gone,0,10,validate\n"
)


@pytest.mark.parametrize(
    "places",
    [
        ("abseiling/aB-1_c_000003_000013.mp4", "zumba/x_000100_000110.mp4"),
        ("aB-1_c_000003_000013.mp4", "x_000100_000110.mp4"),
        ("part_1/aB-1_c.mp4", "x.mp4"),
    ],
)
def test_kinetics_list_decides_the_classes_wherever_the_clips_lie(
    tmp_path: Path, places: tuple[str, str]
) -> None:
    for number, name in enumerate(places, 1):
        write_video(tmp_path / "val" / name, 20 * number, "libx264")
    (tmp_path / "val.csv").write_text(KINETICS)
    made = convert_videos(tmp_path / "val", tmp_path / "set", OWN, tmp_path / "val.csv")
    assert made.classnames == ("abseiling", "zumba")
    assert made.failures == (("gone_000000_000010", "is in the list and not in the folders"),)
    samples = open_set("k", made.folder, "classification", ("{c}",)).samples
    numbers = [number_of(Image.open(io.BytesIO(sample.image.read()))) for sample in samples]
    assert [(sample.label, number) for sample, number in zip(samples, numbers, strict=True)] == [
        (1, 20),
        (0, 10),
    ]


def test_ucfs_list_decides_the_classes_of_videos_in_one_folder(tmp_path: Path) -> None:
    for name in ("v_YoYo_g01_c01", "v_HandStandPushups_g02_c01"):
        write_video(tmp_path / "all" / f"{name}.avi", 20)
    listing = tmp_path / "testlist01.txt"
    listing.write_text("YoYo/v_YoYo_g01_c01.avi\nHandstandPushups/v_HandStandPushups_g02_c01.avi\n")
    made = convert_videos(tmp_path / "all", tmp_path / "set", OWN, listing)
    assert made.classnames == ("Hand Stand Pushups", "Yo Yo")
    samples = open_set("ucf", made.folder, "classification", ("{c}",)).samples
    assert [sample.label for sample in samples] == [1, 0]
    with pytest.raises(InputError, match="expected one a class, or --list with the class of each"):
        find_videos(tmp_path / "all")


def test_two_files_for_one_line_of_a_list_are_refused(ucf: Path, tmp_path: Path) -> None:
    write_video(ucf / "YoYo" / "again" / "v_YoYo_g01_c01.avi", 20)
    (tmp_path / "list.txt").write_text("v_YoYo_g01_c01.avi\n")
    with pytest.raises(InputError, match="'v_YoYo_g01_c01' could be"):
        find_videos(ucf, tmp_path / "list.txt")


@pytest.mark.parametrize("text", ["label,id\nx,y\n", "youtube_id,time_start,time_end\na,b,c\n"])
def test_another_table_than_kinetics_is_refused(ucf: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(InputError, match=r"x\.csv row 2 is not of a list of videos: expected"):
        find_videos(ucf, tmp_path / "x.csv")


def test_bad_videos_are_listed_with_their_reasons(ucf: Path, tmp_path: Path) -> None:
    cut(ucf / "YoYo" / "v_YoYo_g01_c01.avi", 0.01)
    cut(write_video(ucf / "YoYo" / "v_YoYo_g02_c01.avi", 200), 0.6)
    made = convert_videos(ucf, tmp_path / "set", OWN)
    assert made.images == 5
    [(source, reason)] = made.failures
    assert source.endswith("v_YoYo_g01_c01.avi")
    assert reason.startswith(("cannot be decoded", "has no"))
    assert "of 200 promised frames" in (made.folder / "remarks.txt").read_text()
    assert json.loads((made.folder / "conversion.json").read_text())["records"][0]["images"] == 5


def test_a_known_set_of_videos_has_its_classes_and_prompts(ucf: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has 3 classes, but UCF-101 has 101"):
        convert_videos(ucf, tmp_path / "set", Words(find_set("ucf101")))


def test_the_video_library_is_asked_for_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"not installed: pip install 'evaclip\[video\]'"):
        centre_frame(Path("a.avi"))
