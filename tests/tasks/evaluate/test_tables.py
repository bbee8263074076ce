"""Tables of images and labels, and files of captions: every form gives the same set."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from evaclip_model.errors import InputError
from flows.__main__ import main
from tasks.evaluate.sets.convert.caption_sets import captioned_sources
from tasks.evaluate.sets.convert.convert import (
    Words,
    convert_captions,
    convert_imagefolder,
    convert_table,
)
from tasks.evaluate.sets.convert.label_table import read_label_table
from tasks.evaluate.sets.published_layout import EvalSet, open_set

OWN = Words(templates="none")
LABELS = {"a/0.jpg": "red fox", "a/1.jpg": "dog", "b/2.jpg": "dog", "b/3.jpg": "red fox"}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Four images in two folders."""
    for number, name in enumerate(LABELS):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return tmp_path / "images"


def opened(folder: Path, kind: str = "classification") -> EvalSet:
    return open_set("set", folder, kind, ("{c}",))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def listed(separator: str, head: str = "") -> str:
    return head + "".join(f"{path}{separator}{label}\n" for path, label in LABELS.items())


def joined(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def parquet(file: Path, **columns: list) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file


def every_table(folder: Path) -> list[Path]:
    rows = [{"image": path, "label": label} for path, label in LABELS.items()]
    return [
        write(folder / "a.csv", listed(",", "path,label\n")),
        write(folder / "b.csv", "\ufeff" + listed(";", "File Name;Class\n")),
        write(folder / "c.csv", listed(",")),
        write(folder / "d.tsv", listed("\t", "filename\tcategory\n")),
        write(folder / "e.txt", listed("\t")),
        write(folder / "f.jsonl", "".join(json.dumps(row) + "\n" for row in rows)),
        write(folder / "g.json", json.dumps(rows)),
        write(folder / "i.csv", "label,n,path\n" + joined(f"{v},0,{k}" for k, v in LABELS.items())),
        parquet(folder / "h.parquet", image_path=[*LABELS], target=[*LABELS.values()]),
    ]  # fmt: skip


def test_every_form_of_table_gives_the_same_set(images: Path, tmp_path: Path) -> None:
    found = set()
    for number, table in enumerate(every_table(tmp_path)):
        made = convert_table(table, images, tmp_path / f"set{number}", OWN)
        found.add(opened(made.folder).fingerprint)
        assert made.classnames == ("dog", "red fox")
        assert [sample.label for sample in opened(made.folder).samples] == [1, 0, 0, 1]
    assert len(found) == 1


def test_the_same_pictures_are_the_same_set_as_folders_and_as_a_flat_folder_with_a_list(
    images: Path, tmp_path: Path
) -> None:
    rows = []
    for number, (name, label) in enumerate(sorted(LABELS.items(), key=lambda item: item[1])):
        for place in (tmp_path / "folders" / label, tmp_path / "flat"):
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(images / name, place / f"{number}.jpg")
        rows.append(f"{number}.jpg,{label}")
    listing = write(tmp_path / "x.csv", joined(["path,label", *rows]))
    folders = convert_imagefolder(tmp_path / "folders", tmp_path / "one", OWN)
    flat = convert_table(listing, tmp_path / "flat", tmp_path / "two", OWN)
    assert opened(folders.folder).fingerprint == opened(flat.folder).fingerprint


def test_a_flat_folder_and_a_list_with_numbers_take_names_by_number(
    images: Path, tmp_path: Path
) -> None:
    names = write(tmp_path / "names.txt", "fox\ndog\n")
    listing = write(tmp_path / "list.txt", "0.jpg 1\n1.jpg 2\n")
    words = Words(classnames=str(names), templates="none")
    made = convert_table(listing, images / "a", tmp_path / "set", words)
    assert made.classnames == ("fox", "dog")
    assert [sample.label for sample in opened(made.folder).samples] == [0, 1]


def test_kaggles_list_of_imagenet_has_ids_without_suffix_and_boxes_behind_labels(
    images: Path, tmp_path: Path
) -> None:
    rows = "2,n01440764 1 2 3 4\n0,n01443537 5 6 7 8 n01443537 5 6 7 8\n"
    listing = write(tmp_path / "LOC_val_solution.csv", "ImageId,PredictionString\n" + rows)
    made = convert_table(listing, images, tmp_path / "set", OWN)
    assert made.classnames == ("tench", "goldfish")
    first = opened(made.folder).samples[0]
    assert (first.label, first.image.read()) == (0, (images / "b" / "2.jpg").read_bytes())


def every_multilabel_table(folder: Path) -> list[Path]:
    several = {"a/0.jpg": ["cat", "dog"], "a/1.jpg": [], "b/2.jpg": ["eel"]}
    rows = [{"path": path, "labels": labels} for path, labels in several.items()]
    return [
        write(folder / "a.csv", "path,labels\na/0.jpg,cat|dog\na/1.jpg,\nb/2.jpg,eel\n"),
        write(folder / "b.csv", 'path,labels\na/0.jpg,"cat, dog"\na/1.jpg,\nb/2.jpg,eel\n'),
        write(folder / "c.csv", "path,labels\na/0.jpg,dog\na/1.jpg,\na/0.jpg,cat\nb/2.jpg,eel\n"),
        write(folder / "d.csv", "path,cat,dog,eel\na/0.jpg,1,1,0\na/1.jpg,0,0,0\nb/2.jpg,0,0,1\n"),
        write(folder / "e.jsonl", "".join(json.dumps(row) + "\n" for row in rows)),
        parquet(folder / "f.parquet", path=[*several], labels=[*several.values()]),
    ]  # fmt: skip


def test_every_form_of_several_labels_gives_the_same_set(images: Path, tmp_path: Path) -> None:
    found = set()
    for number, table in enumerate(every_multilabel_table(tmp_path)):
        made = convert_table(table, images, tmp_path / f"set{number}", OWN, several=True)
        samples = opened(made.folder, "multilabel").samples
        assert [sample.labels for sample in samples] == [(0, 1), (), (2,)]
        found.add(opened(made.folder, "multilabel").fingerprint)
    assert len(found) == 1


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is empty"),
        ("path,label\na/0.jpg\n", "row 2 has 1 cells, expected 2"),
        ("path,label\na/0.jpg,\n", "row 2 has no label in 'label'"),
        ("path,label\n,dog\n", "row 2 has no path in 'path'"),
        ("path,label\n../../etc/passwd,dog\n", "is not a file inside"),
        ("path,label\n/etc/passwd,dog\n", "is not a file inside"),
        ("path,label\na/0.jpg,dog\na/0.jpg,cat\n", "has the label 'cat' here and 'dog' at"),
        ("where,what,who\na/0.jpg,dog,x\n", "which column has the paths of images"),
        ("path,what,who\na/0.jpg,dog,x\n", "which column has the labels"),
        ("path,label,split\na/0.jpg,dog,train\na/1.jpg,dog,test\n", "several splits"),
    ],
)
def test_what_a_table_lacks_is_named(
    images: Path, tmp_path: Path, text: str, complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint):
        read_label_table(write(tmp_path / "x.csv", text), images)


def test_columns_and_a_split_are_chosen_by_name(images: Path, tmp_path: Path) -> None:
    listing = write(tmp_path / "x.csv", "where,what,split\na/0.jpg,dog,train\na/1.jpg,cat,test\n")
    found = read_label_table(listing, images, ("where", "what"), split="test")
    assert found.words == ["cat"]
    with pytest.raises(InputError, match="has no column 'who'; it has where, what, split"):
        read_label_table(listing, images, ("who", ""), split="test")


def test_names_are_taken_before_numbers_and_whole_floats_are_numbers(
    images: Path, tmp_path: Path
) -> None:
    both = write(tmp_path / "x.csv", "path,label,label_name\na/0.jpg,7,dog\na/1.jpg,2,cat\n")
    assert read_label_table(both, images).words == ["cat", "dog"]
    floats = write(tmp_path / "y.csv", "path,label\na/0.jpg,1.0\na/1.jpg,0.0\n")
    assert read_label_table(floats, images).words == ["0", "1"]
    missing = write(tmp_path / "z.csv", "path,label\na/0.jpg,1\na/1.jpg,-1\n")
    with pytest.raises(InputError, match="'-1' is not the number of a class"):
        convert_table(missing, images, tmp_path / "set", OWN)


def test_a_label_of_more_digits_than_python_reads_is_a_name(images: Path, tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", f"path,label\na/0.jpg,{'7' * 5_000}\na/1.jpg,8\n")
    assert read_label_table(table, images).words == ["7" * 5_000, "8"]


def test_quotes_in_a_tab_separated_file_part_cells_or_are_text(
    images: Path, tmp_path: Path
) -> None:
    text = 'image\tcaption\na/0.jpg\t"a dog\na/1.jpg\t"a cat" sleeps\na/0.jpg\tbig"\n'
    found = captioned_sources(write(tmp_path / "x.tsv", text), images)
    assert [source.answer for source in found] == [('"a dog', 'big"'), ('"a cat" sleeps',)]
    text = 'image\tcaption\na/0.jpg\t"a ""big"" dog"\n'
    (only,) = captioned_sources(write(tmp_path / "y.tsv", text), images)
    assert only.answer == ('a "big" dog',)


def test_missing_images_are_counted_by_their_reason(images: Path, tmp_path: Path) -> None:
    listing = write(tmp_path / "x.csv", "path,label\na/0.jpg,dog\na/9.jpg,cat\na/8.jpg,cat\n")
    made = convert_table(listing, images, tmp_path / "set", OWN)
    assert made.left_out() == {"cannot be read: No such file or directory": 2}
    assert made.failures[0][0].endswith("a/9.jpg")


def test_a_table_is_converted_by_command(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listing = write(tmp_path / "x.csv", listed(",", "path,label\n") + "a/9.jpg,dog\n")
    words = ["evalsets", "convert", "table", str(listing), str(images), str(tmp_path / "set")]
    assert main([*words, "--templates", "openai"]) == 0
    said = capsys.readouterr().out
    assert "4 images in 1 tars" in said and "2 classes: dog, red fox" in said
    assert "1 left out: cannot be read: No such file or directory" in said


CAPTIONS = {"a/0.jpg": ["a fox", "a red fox"], "a/1.jpg": ["one", "two", "three"]}


def every_caption_file(folder: Path) -> list[Path]:
    """The same captions in every form."""
    pairs = [(name, text) for name, texts in CAPTIONS.items() for text in texts]
    karpathy = [
        {
            "filepath": "a",
            "filename": name[2:],
            "split": "test",
            "sentences": [{"raw": t} for t in texts],
        }
        for name, texts in CAPTIONS.items()
    ]
    official = {
        "images": [{"id": 7 - n, "file_name": name} for n, name in enumerate(CAPTIONS)],
        "annotations": [
            {"id": n, "image_id": 7 - [*CAPTIONS].index(name), "caption": text}
            for n, (name, text) in enumerate(pairs)
        ],
    }
    blip = [{"image": name, "caption": texts} for name, texts in CAPTIONS.items()]
    single = [{"image": name, "caption": text, "image_id": "x"} for name, text in pairs]
    token = "".join(f"{name}#{n}\t{text}\n" for n, (name, text) in enumerate(pairs))
    return [
        write(folder / "dataset_coco.json", json.dumps({"images": karpathy})),
        write(folder / "captions_val2014.json", json.dumps(official)),
        write(folder / "coco_karpathy_test.json", json.dumps(blip)),
        write(folder / "coco_karpathy_train.json", json.dumps(single)),
        write(folder / "results_20130124.token", token),
        write(
            folder / "results.csv",
            "image_name| comment_number| comment\n" + joined(f"{n}| 0| {t}" for n, t in pairs),
        ),
        write(folder / "captions.txt", "image,caption\n" + "".join(f"{n},{t}\n" for n, t in pairs)),
        write(folder / "c.jsonl", "".join(json.dumps(row) + "\n" for row in blip)),
        parquet(folder / "c.parquet", image=[*CAPTIONS], caption=[*CAPTIONS.values()]),
    ]  # fmt: skip


def test_every_form_of_captions_gives_the_same_set(images: Path, tmp_path: Path) -> None:
    found = set()
    for number, listing in enumerate(every_caption_file(tmp_path)):
        made = convert_captions(listing, images, tmp_path / f"set{number}")
        samples = open_set("c", made.folder, "retrieval").samples
        assert [list(sample.captions) for sample in samples] == [*CAPTIONS.values()], listing
        found.add(open_set("c", made.folder, "retrieval").fingerprint)
    assert len(found) == 1


@pytest.mark.parametrize("name", ["../private.jpg", "/etc/passwd", "a/../../x.jpg", ""])
def test_a_file_of_captions_leads_to_no_file_outside_its_folder(
    images: Path, tmp_path: Path, name: str
) -> None:
    listing = write(tmp_path / "x.json", json.dumps([{"image": name, "caption": "x"}]))
    said = "is not a file inside" if name else "row 1 has no path in 'image'"
    with pytest.raises(InputError, match=said):
        captioned_sources(listing, images)


def test_a_picture_that_is_converted_keeps_its_pixels(images: Path, tmp_path: Path) -> None:
    Image.open(images / "a" / "0.jpg").save(images / "a" / "x.img", format="TIFF")
    listing = write(tmp_path / "x.csv", "path,label\na/x.img,dog\n")
    made = convert_table(listing, images, tmp_path / "set", OWN)
    with (
        Image.open(io.BytesIO(opened(made.folder).samples[0].image.read())) as image,
        Image.open(images / "a" / "0.jpg") as before,
    ):
        assert np.array_equal(np.asarray(image), np.asarray(before))


@pytest.mark.parametrize("name", ["list.csv", "list.jsonl", "list.parquet", "pairs.json"])
def test_a_list_that_the_disk_does_not_give_is_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("/proc/self/mem")  # a file, of which nothing can be read
    with pytest.raises(InputError, match=rf"^\S+{name} cannot be read \(.+\): expected "):
        if name == "pairs.json":
            captioned_sources(tmp_path / name, tmp_path)
        else:
            read_label_table(tmp_path / name, tmp_path)
