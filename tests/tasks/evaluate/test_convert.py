"""Converters: what they write is what others' readers read, whole, and the same every time."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from evaclip_model.errors import InputError
from tasks.evaluate.sets.class_order import NO_TEMPLATES, Words
from tasks.evaluate.sets.convert.caption_sets import captioned_sources
from tasks.evaluate.sets.convert.convert import (
    class_names,
    convert_captions,
    convert_imagefolder,
    dataset_sources,
)
from tasks.evaluate.sets.convert.label_table import read_rows
from tasks.evaluate.sets.convert.shard_writer import (
    Found,
    Source,
    UnusableSourceError,
    encode_png,
    write_set,
)
from tasks.evaluate.sets.convert.source_images import FileFinder, image_source, walk_files
from tasks.evaluate.sets.published_layout import open_set
from tasks.evaluate.sets.set_registry import find_set

OWN = Words(templates=NO_TEMPLATES)


def noise(seed: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 30, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    """Three classes of four images in four formats."""
    for place, name in enumerate(("acorn_woodpecker", "bald_eagle", "crow")):
        for number, suffix in enumerate(("jpg", "png", "bmp", "webp")):
            save(tmp_path / "birds" / name / f"{number}.{suffix}", noise(4 * place + number))
    return tmp_path / "birds"


def tar_bytes(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((folder / "test").iterdir())]


def numbered(count: int, read: list[int] | None = None) -> list[Source]:
    """Sources of one small image each, which note that they were read."""

    def found(number: int) -> Found:
        if read is not None:
            read.append(number)
        return Found(encode_png(noise(number)), "png", number % 3)

    return [Source(f"image {n}", lambda n=n: found(n)) for n in range(count)]


def test_a_folder_a_class_becomes_a_set_with_its_names(birds: Path, tmp_path: Path) -> None:
    words = Words(templates=str(tmp_path / "templates.txt"))
    (tmp_path / "templates.txt").write_text("a photo of a {c}.\n{c}\n")
    made = convert_imagefolder(birds, tmp_path / "set", words)
    assert (made.images, made.tars, made.failures) == (12, 1, ())
    found = open_set("birds", made.folder, "classification")
    assert found.classnames == ("acorn woodpecker", "bald eagle", "crow")
    assert found.templates == ("a photo of a {c}.", "{c}")
    assert [sample.label for sample in found.samples] == [0] * 4 + [1] * 4 + [2] * 4


def test_files_that_may_are_copied_and_others_keep_their_pixels(
    birds: Path, tmp_path: Path
) -> None:
    made = convert_imagefolder(birds, tmp_path / "set", OWN)
    samples = open_set("birds", made.folder, "classification", ("{c}",)).samples
    for sample, name in zip(samples[:4], ("0.jpg", "1.png", "2.bmp", "3.webp"), strict=True):
        original = birds / "acorn_woodpecker" / name
        if name != "2.bmp":
            assert sample.image.read() == original.read_bytes()
        with Image.open(io.BytesIO(sample.image.read())) as image, Image.open(original) as before:
            assert np.array_equal(np.asarray(image), np.asarray(before))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_an_image_of_any_mode_is_written_without_loss(mode: str) -> None:
    image = noise(3, "L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) << 8)
    with Image.open(io.BytesIO(encode_png(image))) as read:
        assert np.array_equal(np.asarray(read), np.asarray(image))
    cmyk = noise(3, "CMYK")
    with Image.open(io.BytesIO(encode_png(cmyk))) as read:
        assert np.array_equal(np.asarray(read), np.asarray(cmyk.convert("RGB")))


def test_what_cannot_be_read_is_listed_and_left_out(birds: Path, tmp_path: Path) -> None:
    (birds / "crow" / "0.jpg").write_bytes(b"no image")
    cut = birds / "bald_eagle" / "1.png"
    cut.write_bytes(cut.read_bytes()[:400])
    (birds / "crow" / "4.jpg").symlink_to("nowhere")
    made = convert_imagefolder(birds, tmp_path / "set", OWN)
    assert made.images == 10
    assert [Path(source).name for source, _ in made.failures] == ["1.png", "0.jpg", "4.jpg"]
    lines = (made.folder / "failures.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == [source for source, _ in made.failures]
    assert all("is not an image" in reason for _, reason in made.failures[:2])
    assert "No such file" in made.failures[2][1]
    keys = [sample.key for sample in open_set("b", made.folder, "classification", ("{c}",)).samples]
    assert len(keys) == 10
    assert "s0000008" not in keys


def test_a_pipe_among_pictures_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")
    with pytest.raises(InputError, match=r"x\.jpg is a pipe, not a file"):
        [*walk_files(tmp_path)]


def test_a_set_of_nothing_is_refused(tmp_path: Path) -> None:
    def fail() -> Found:
        raise UnusableSourceError("is no image")

    with pytest.raises(InputError, match=r"none of 2 could be used \(the first, a, is no image\)"):
        write_set(
            *(tmp_path / "set", [Source("a", fail), Source("b", fail)]),
            kind="classification",
            plan="x",
        )
    assert not (tmp_path / "set").exists()


def test_the_same_sources_give_the_same_bytes_and_are_not_read_twice(tmp_path: Path) -> None:
    read: list[int] = []
    sources = numbered(25, read)
    for name in ("first", "second", "first"):
        made = write_set(
            *(tmp_path / name, sources), kind="classification", plan="x", images_per_tar=10
        )
        assert (made.images, made.tars) == (25, 3)
    assert len(read) == 50
    assert tar_bytes(tmp_path / "first") == tar_bytes(tmp_path / "second")


def test_after_a_stop_whole_tars_are_kept_and_the_rest_is_written(tmp_path: Path) -> None:
    whole = write_set(
        *(tmp_path / "whole", numbered(25)), kind="classification", plan="x", images_per_tar=10
    )
    read: list[int] = []

    def stop(done: float, total: float, detail: str = "") -> None:
        if done == 15:
            raise KeyboardInterrupt

    arguments = {"kind": "classification", "plan": "x", "images_per_tar": 10}
    with pytest.raises(KeyboardInterrupt):
        write_set(tmp_path / "set", numbered(25), **arguments, report=stop)
    assert not (tmp_path / "set").exists()
    made = write_set(tmp_path / "set", numbered(25, read), **arguments)
    assert sorted(read) == list(range(10, 25))
    assert tar_bytes(made.folder) == tar_bytes(whole.folder)


def test_a_killed_conversion_goes_on(tmp_path: Path, birds: Path) -> None:
    program = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from tasks.evaluate.sets.convert.source_images import FileFinder, image_source, walk_files
        from tasks.evaluate.sets.convert.shard_writer import write_set
        sources = [image_source(path, 0) for path in walk_files(Path(sys.argv[1]))]
        def report(done, total, detail=""):
            if done == 7:
                os.kill(os.getpid(), signal.SIGKILL)
        write_set(Path(sys.argv[2]), sources, kind="classification", plan="x", images_per_tar=2,
                  report=report)
        """
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", program, str(birds), str(tmp_path / "set")]
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    kept = {path.name for path in (tmp_path / ".set.part" / "test").glob("[0-9].tar")}
    assert kept == {"0.tar", "1.tar", "2.tar"}
    sources = [image_source(path, 0) for path in walk_files(birds)]
    made = write_set(
        *(tmp_path / "set", sources), kind="classification", plan="x", images_per_tar=2
    )
    assert (made.images, made.tars) == (12, 6)
    assert not list(tmp_path.glob(".set*"))
    whole = write_set(
        *(tmp_path / "whole", sources), kind="classification", plan="x", images_per_tar=2
    )
    assert tar_bytes(made.folder) == tar_bytes(whole.folder)


def test_another_plan_starts_anew_and_a_finished_set_is_not_overwritten(tmp_path: Path) -> None:
    def stop(done: float, total: float, detail: str = "") -> None:
        raise KeyboardInterrupt

    arguments = {"kind": "classification", "images_per_tar": 1}
    with pytest.raises(KeyboardInterrupt):
        write_set(tmp_path / "set", numbered(3), plan="one", **arguments, report=stop)
    made = write_set(tmp_path / "set", numbered(2), plan="two", **arguments)
    assert made.images == 2
    with pytest.raises(InputError, match="is there already, and not from these sources"):
        write_set(tmp_path / "set", numbered(3), plan="one", **arguments)
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="is there already"):
        write_set(tmp_path / "other", numbered(3), plan="one", **arguments)


def test_the_same_command_over_changed_sources_makes_the_set_anew(
    birds: Path, tmp_path: Path
) -> None:
    first = convert_imagefolder(birds, tmp_path / "set", OWN)
    save(birds / "crow" / "more.png", noise(99))
    second = convert_imagefolder(birds, tmp_path / "set", OWN)
    assert (first.images, first.again, second.images, second.again) == (12, False, 13, True)
    assert not convert_imagefolder(birds, tmp_path / "set", OWN).again
    save(birds / "crow" / "more.png", noise(100))
    assert convert_imagefolder(birds, tmp_path / "set", OWN).again
    samples = open_set("birds", second.folder, "classification", ("{c}",)).samples
    with Image.open(io.BytesIO(samples[-1].image.read())) as image:
        assert np.array_equal(np.asarray(image), np.asarray(noise(100)))
    save(tmp_path / "others" / "crow" / "a.png", noise(1))
    with pytest.raises(InputError, match="not from these sources"):
        convert_imagefolder(tmp_path / "others", tmp_path / "set", OWN)
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


def test_every_file_is_taken_or_counted_whatever_its_suffix(birds: Path, tmp_path: Path) -> None:
    save(birds / "crow" / "a.jfif", noise(1), format="JPEG")
    save(birds / "crow" / "b", noise(2), format="PNG")
    save(birds / "crow" / "c.pgm", noise(3, "L"))
    save(tmp_path / "elsewhere" / "deep" / "d.JPG", noise(4), format="JPEG")
    (birds / "crow" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "elsewhere")
    for name in ("notes.txt", "more.txt", "._a.jpg", "Thumbs.db"):
        (birds / "crow" / name).write_text("no image")
    (birds / "README.md").write_text("birds")
    made = convert_imagefolder(birds, tmp_path / "set", OWN)
    assert made.images == 16
    assert made.left_out() == {"is not an image (.txt)": 2, "is a file of the operating system": 2}
    assert any("1 files beside the class folders" in remark for remark in made.about_names)


def test_a_known_set_with_other_classes_is_refused(birds: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has 3 classes, but DTD has 47"):
        convert_imagefolder(birds, tmp_path / "set", Words(find_set("dtd"), templates="none"))
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    with pytest.raises(InputError, match=r"has 2 class names for the 3 classes of .*birds"):
        convert_imagefolder(
            *(birds, tmp_path / "set"), Words(None, str(tmp_path / "names.txt"), "none")
        )


def test_folders_of_splits_are_not_taken_for_classes(birds: Path, tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    for split in ("train", "val"):
        (tmp_path / "all" / split).symlink_to(birds)
    with pytest.raises(InputError, match="train, val, which are splits, not classes"):
        convert_imagefolder(tmp_path / "all", tmp_path / "set", OWN)


def test_templates_are_asked_for_and_never_guessed(birds: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="which prompt templates has this set"):
        convert_imagefolder(birds, tmp_path / "set", Words())
    (tmp_path / "templates.txt").write_text("a photo of a {c}.\na photo of a {}.\n")
    with pytest.raises(InputError, match=r"template 'a photo of a \{\}\.' has no \{c\}"):
        Words(templates=str(tmp_path / "templates.txt")).set_templates()
    (tmp_path / "templates.json").write_text('["a photo of a {c}.", "a {c}"]')
    with pytest.raises(InputError, match="or is JSON: write one a line"):
        Words(templates=str(tmp_path / "templates.json")).set_templates()
    assert Words(find_set("ucf101")).set_templates()[0] == "a photo of a person {c}."
    assert len(Words(find_set("objectnet")).set_templates()) == 80
    made = convert_imagefolder(birds, tmp_path / "set", OWN)
    assert not (made.folder / "zeroshot_classification_templates.txt").exists()


@pytest.fixture
def karpathy(tmp_path: Path) -> Path:
    """A file of Karpathy's form: two test images in a folder each, and one for training."""
    entries = []
    for number, split in enumerate(("test", "train", "test")):
        save(tmp_path / "images" / "val2014" / f"{number}.jpg", noise(number))
        captions = [f"caption {number}.{k}" for k in range(5 + number)] + [" two\nlines ", ""]
        sentences = [{"raw": caption} for caption in captions]
        entry = {"filename": f"{number}.jpg", "split": split, "sentences": sentences}
        entries.append({**entry, "filepath": "val2014"})
    (tmp_path / "dataset.json").write_text(json.dumps({"images": entries, "dataset": "coco"}))
    return tmp_path / "dataset.json"


def test_all_captions_of_the_test_split_are_kept(karpathy: Path, tmp_path: Path) -> None:
    made = convert_captions(karpathy, tmp_path / "images", tmp_path / "set")
    found = open_set("coco", made.folder, "retrieval")
    assert [len(sample.captions) for sample in found.samples] == [6, 8]
    assert found.samples[0].captions[0] == "caption 0.0"
    assert found.samples[0].captions[-1] == "two\nlines"


@pytest.mark.parametrize("text", ["{", '{"images": 3}', '{"images": [{"split": "test"}]}', "[]"])
def test_another_file_than_karpathys_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=r"(is not|or is not) of a known form: expected"):
        captioned_sources(tmp_path / "x.json", tmp_path)


@pytest.mark.parametrize(
    "annotation", [{"image_id": "1", "caption": "a"}, {"image_id": 1, "caption": None}]
)
def test_an_annotation_of_no_image_or_without_caption_is_named(
    tmp_path: Path, annotation: dict[str, object]
) -> None:
    images = [{"id": 1, "file_name": "1.jpg"}]
    content = {"images": images, "annotations": [{"id": 7, **annotation}]}
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"annotation 7 of image '?1'? has no caption, or"):
        captioned_sources(tmp_path / "x.json", tmp_path)


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_json_and_json_lines_are_told_apart_by_what_they_hold(tmp_path: Path, name: str) -> None:
    rows = [{"path": "1.jpg", "label": "a"}, {"path": "2.jpg", "label": "b"}]
    lines = "\n".join(map(json.dumps, rows))
    for text in (json.dumps(rows), json.dumps(rows, indent=1), lines):
        (tmp_path / name).write_text(text)
        assert [row for _, row in read_rows(tmp_path / name)[1]] == rows


def test_a_path_that_windows_wrote_is_found(tmp_path: Path) -> None:
    save(tmp_path / "a/1.png", noise(1))
    finder = FileFinder(tmp_path)
    assert finder.find_file("a\\1.png", "x") == tmp_path / "a/1.png"
    with pytest.raises(InputError, match="is not a file inside"):
        finder.find_file("a\\..\\..\\1.png", "x")


def test_a_table_that_is_not_utf8_says_how_to_save_it(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes("path,label\n1.jpg,café\n".encode("latin-1"))
    with pytest.raises(InputError, match="byte 20 is not UTF-8: save it as UTF-8"):
        read_rows(tmp_path / "x.csv")


def test_captions_that_are_not_utf8_say_how_to_save_them(tmp_path: Path) -> None:
    (tmp_path / "results.token").write_bytes("1.jpg#0\tcaf\u00e9\n".encode("latin-1"))
    with pytest.raises(InputError, match="byte 11 is not UTF-8: save it as UTF-8"):
        captioned_sources(tmp_path / "results.token", tmp_path)


def test_nan_is_no_caption_of_a_list(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"image": "1.jpg", "text": NaN}\n')
    with pytest.raises(InputError, match=r"1\.jpg has no caption"):
        captioned_sources(tmp_path / "a.jsonl", tmp_path)


def test_a_list_that_holds_the_images_themselves_says_so(tmp_path: Path) -> None:
    images = [{"bytes": b"x" * 500, "path": "1.jpg"}]
    pq.write_table(pa.table({"image": images, "caption": [["a", "b"]]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="row 1: 'image' holds images, not paths: write them"):
        captioned_sources(tmp_path / "a.parquet", tmp_path)


def test_a_split_that_is_not_there_is_named_beside_those_that_are(karpathy: Path) -> None:
    with pytest.raises(InputError, match="no image in the split 'restval'; there are: test, train"):
        captioned_sources(karpathy, karpathy.parent, "restval")


class Shapes:
    """A data set object of torchvision's form: an image and a label by index, and class names."""

    def __init__(self) -> None:
        self.classes = ["flat_disc", "square/outdoor"]

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        return noise(index, "L"), (np.int64(index % 2) if index < 5 else None)


def test_any_data_set_object_of_torchvisions_form_becomes_a_set(tmp_path: Path) -> None:
    shapes = Shapes()
    names = class_names(shapes, spaces="_/")
    assert names == ("flat disc", "square outdoor")
    made = write_set(
        *(tmp_path / "set", dataset_sources(shapes, relabel=(1, 0))),
        kind="classification",
        plan="shapes",
        classnames=names,
        templates=("a {c}",),
    )
    assert made.failures == (("Shapes[5]", "has no label"),)
    found = open_set("shapes", made.folder, "classification")
    assert [sample.label for sample in found.samples] == [1, 0, 1, 0, 1]
    with Image.open(io.BytesIO(found.samples[3].image.read())) as image:
        assert np.array_equal(np.asarray(image), np.asarray(noise(3, "L")))


def test_a_data_set_object_without_names_asks_for_them() -> None:
    with pytest.raises(InputError, match="Shapes has no categories: give a file"):
        class_names(Shapes(), "categories")


def read_by_webdataset(folder: Path, answer: str) -> Iterator[tuple[Image.Image, Any]]:
    """Samples as CLIP_benchmark's reader gets them from webdataset."""
    count = int((folder / "test" / "nshards.txt").read_text())
    tars = str(folder / "test" / f"{{0..{count - 1}}}.tar")
    images = webdataset.autodecode.ImageHandler("pil", extensions=["webp", "png", "jpg", "jpeg"])
    dataset = webdataset.WebDataset(tars, shardshuffle=False).decode(images)
    yield from dataset.to_tuple(["webp", "png", "jpg", "jpeg"], answer)


def test_webdataset_reads_what_is_written(birds: Path, karpathy: Path, tmp_path: Path) -> None:
    made = convert_imagefolder(birds, tmp_path / "set", OWN)
    read = list(read_by_webdataset(made.folder, "cls"))
    assert [label for _, label in read] == [0] * 4 + [1] * 4 + [2] * 4
    assert all(image.size == (30, 20) for image, _ in read)
    made = convert_captions(karpathy, tmp_path / "images", tmp_path / "captions")
    texts = [text.splitlines() for _, text in read_by_webdataset(made.folder, "txt")]
    assert [len(text) for text in texts] == [6, 8]
    assert texts[0][-1] == r"two\nlines"
    made = write_set(
        *(tmp_path / "several", several((1,), (0, 1), ())),
        kind="multilabel",
        plan="x",
        classnames=("a", "b"),
        templates=("{c}",),
        images_per_tar=1,
    )
    vectors = [vector.tolist() for _, vector in read_by_webdataset(made.folder, "npy")]
    assert vectors == [[0, 1], [1, 1], [0, 0]]
    samples = open_set("several", made.folder, "multilabel").samples
    assert [sample.labels for sample in samples] == [(1,), (0, 1), ()]


def several(*vectors: Sequence[int]) -> list[Source]:
    return [
        Source(str(n), lambda n=n, v=v: Found(encode_png(noise(n)), "png", v))
        for n, v in enumerate(vectors)
    ]


def test_clip_benchmark_reads_what_is_written(birds: Path, karpathy: Path, tmp_path: Path) -> None:
    pytest.importorskip("clip_benchmark")
    from tests.evaclip_model import peer_libraries  # noqa: F401, I001
    from clip_benchmark.datasets.builder import build_wds_dataset

    words = Words(templates="openai")
    made = convert_imagefolder(birds, tmp_path / "set", words)
    read = build_wds_dataset("birds", lambda image: image, data_dir=str(made.folder))
    assert read.classes == ["acorn woodpecker", "bald eagle", "crow"]
    assert len(read.templates) == 80
    assert [label for _, label in read] == [0] * 4 + [1] * 4 + [2] * 4
    made = convert_captions(karpathy, tmp_path / "images", tmp_path / "captions")
    read = build_wds_dataset("coco", lambda image: image, data_dir=str(made.folder))
    assert [len(captions) for _, captions in read] == [6, 8]
