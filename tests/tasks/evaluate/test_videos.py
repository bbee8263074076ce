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
from tasks.evaluate.sets.convert.imagefolder import class_folders
from tasks.evaluate.sets.convert.shard_writer import UnusableSourceError
from tasks.evaluate.sets.convert.videos import centre_frame, video_names, video_sources
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
        (tmp_path / name).mkdir()
    assert video_names(class_folders(tmp_path)) == ("air drumming", "playing ping pong")


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


def test_a_list_of_kinetics_names_videos_by_id_and_time(tmp_path: Path) -> None:
    for name in ("abseiling/aB-1_c_000003_000013.mp4", "zumba/x_000100_000110.mp4"):
        write_video(tmp_path / "val" / name, 10, "libx264")
    listing = tmp_path / "val.csv"
    listing.write_text(
        "label,youtube_id,time_start,time_end,split\n"
        "zumba,x,100,110,validate\nabseiling,aB-1_c,3,13,validate\nabseiling,gone,0,10,validate\n"
    )
    sources = video_sources(class_folders(tmp_path / "val"), listing)
    assert [source.read().answer for source in sources[:2]] == [1, 0]
    with pytest.raises(UnusableSourceError, match="is in the list"):
        sources[2].read()


@pytest.mark.parametrize("text", ["label,id\nx,y\n", "youtube_id,time_start,time_end\na,b,c\n"])
def test_another_table_than_kinetics_is_refused(ucf: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(InputError, match="is no list of videos: expected CLASS/FILE"):
        video_sources(class_folders(ucf), tmp_path / "x.csv")


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
