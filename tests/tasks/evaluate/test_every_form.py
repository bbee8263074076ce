"""The same pictures in every form in which people have them give the same labels and figures."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from tasks.evaluate.metrics.compute import compute_figures
from tasks.evaluate.metrics.scored import score_set
from tasks.evaluate.sets.convert.convert import (
    Words,
    convert_captions,
    convert_imagefolder,
    convert_table,
)
from tasks.evaluate.sets.convert.shard_writer import Conversion
from tasks.evaluate.sets.published_layout import EvalSet, open_set
from tests.tasks.evaluate.conftest import write_tar

NAMES = ("tree frog", "great auk", "ox", *(f"animal {n}" for n in range(3, 12)))
COUNT = 3
OWN = Words(templates="none")


def pixels(label: int, number: int) -> Image.Image:
    """A picture whose mean colour says what it is: what a "model" here sees."""
    return Image.new("RGB", (8, 8), (20 * label + 3, 60 * number + 5, 128))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`CLASS/NUMBER.png` of every class and number."""
    root = tmp_path_factory.mktemp("pictures")
    for label, name in enumerate(NAMES):
        (root / name).mkdir()
        for number in range(COUNT):
            pixels(label, number).save(root / name / f"{label}_{number}.png")
    return root


@pytest.fixture
def listed(tmp_path: Path) -> str:
    path = tmp_path / "names.txt"
    path.write_text("\n".join(NAMES) + "\n")
    return str(path)


def rows() -> list[tuple[str, str]]:
    return [
        (f"{name}/{label}_{number}.png", name)
        for label, name in enumerate(NAMES)
        for number in range(COUNT)
    ]


def write_rows(path: Path, header: tuple[str, str] | None, **dialect: str) -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, **dialect)
        writer.writerows([*([header] if header else []), *rows()])
    return path


def renamed(pictures: Path, target: Path, name_of: Callable[[int], str], suffix: str = "") -> Path:
    for label, name in enumerate(NAMES):
        shutil.copytree(pictures / name, target / name_of(label))
    for path in [*target.rglob("*.png")] if suffix else []:
        path.rename(path.with_suffix(suffix))
    return target


def figures_of(evalset: EvalSet) -> dict[str, object]:
    """Figures of a "model" that takes three classes for others, by pictures and names alone."""
    order = sorted(NAMES)
    drawn = torch.randn(len(NAMES), 32, generator=torch.Generator().manual_seed(0))
    basis = torch.nn.functional.normalize(drawn, dim=1)
    said = []
    for sample in evalset.samples:
        red, green, _ = Image.open(io.BytesIO(sample.image.read())).convert("RGB").getpixel((0, 0))
        name = NAMES[(red - 3) // 20]
        place = order.index(name)
        said.append(basis[(place + (place < 3 and green > 60)) % len(NAMES)])
    classifier = basis[[order.index(name) for name in evalset.classnames]]
    found = compute_figures(score_set(evalset, torch.stack(said), classifier))
    return {
        **{name: found[name] for name in ("n", "top1", "top5", "mean_per_class", "intervals")},
        "per_class": sorted((one["name"], one["n"], one["correct"]) for one in found["per_class"]),
    }


def plain(pictures: Path, tmp: Path, listed: str) -> Conversion:
    return convert_imagefolder(pictures, tmp / "set", OWN)


def named(pictures: Path, tmp: Path, listed: str) -> Conversion:
    return convert_imagefolder(pictures, tmp / "set", Words(classnames=listed, templates="none"))


def numbers_from_1(pictures: Path, tmp: Path, listed: str) -> Conversion:
    root = renamed(pictures, tmp / "n", lambda label: str(label + 1))
    return convert_imagefolder(root, tmp / "set", Words(classnames=listed, templates="none"))


def padded_numbers(pictures: Path, tmp: Path, listed: str) -> Conversion:
    root = renamed(pictures, tmp / "n", lambda label: f"{label:03d}")
    return convert_imagefolder(root, tmp / "set", Words(classnames=listed, templates="none"))


def numbered_names(pictures: Path, tmp: Path, listed: str) -> Conversion:
    root = renamed(pictures, tmp / "n", lambda at: f"{at + 1}.{NAMES[at].replace(' ', '_')}")
    return convert_imagefolder(root, tmp / "set", OWN)


def other_case(pictures: Path, tmp: Path, listed: str) -> Conversion:
    root = renamed(pictures, tmp / "n", lambda at: NAMES[at].title().replace(" ", "-"))
    return convert_imagefolder(root, tmp / "set", Words(classnames=listed, templates="none"))


def upper_suffixes(pictures: Path, tmp: Path, listed: str) -> Conversion:
    return convert_imagefolder(
        renamed(pictures, tmp / "n", NAMES.__getitem__, ".PNG"), tmp / "set", OWN
    )


def without_suffixes(pictures: Path, tmp: Path, listed: str) -> Conversion:
    root = renamed(pictures, tmp / "n", NAMES.__getitem__)
    for path in root.rglob("*.png"):
        path.rename(path.with_suffix(""))
    return convert_imagefolder(root, tmp / "set", OWN)


def linked_folders(pictures: Path, tmp: Path, listed: str) -> Conversion:
    (tmp / "n").mkdir()
    for name in NAMES:
        (tmp / "n" / name).symlink_to(pictures / name)
    return convert_imagefolder(tmp / "n", tmp / "set", OWN)


def from_a_mac(pictures: Path, tmp: Path, listed: str) -> Conversion:
    root = renamed(pictures, tmp / "n", NAMES.__getitem__)
    for path in [*root.rglob("*.png")]:
        path.with_name(f"._{path.name}").write_bytes(b"attributes")
    (root / ".DS_Store").write_bytes(b"x")
    (root / "__MACOSX" / NAMES[0]).mkdir(parents=True)
    (root / "__MACOSX" / NAMES[0] / "._x.png").write_bytes(b"x")
    return convert_imagefolder(root, tmp / "set", OWN)


def csv_with_header(pictures: Path, tmp: Path, listed: str) -> Conversion:
    table = write_rows(tmp / "l.csv", ("Image Path", "Class Name"))
    return convert_table(table, pictures, tmp / "set", OWN)


def csv_without_header(pictures: Path, tmp: Path, listed: str) -> Conversion:
    return convert_table(write_rows(tmp / "l.csv", None), pictures, tmp / "set", OWN)


def csv_of_semicolons(pictures: Path, tmp: Path, listed: str) -> Conversion:
    table = write_rows(tmp / "l.csv", ("file", "label"), delimiter=";")
    return convert_table(table, pictures, tmp / "set", OWN)


def quoted_tsv(pictures: Path, tmp: Path, listed: str) -> Conversion:
    table = write_rows(tmp / "l.tsv", ("path", "species"), delimiter="\t")
    return convert_table(table, pictures, tmp / "set", OWN)


def plain_list(pictures: Path, tmp: Path, listed: str) -> Conversion:
    lines = [f"{path} {NAMES.index(name)}\r\n" for path, name in rows()]
    (tmp / "l.txt").write_text("".join(lines))
    words = Words(classnames=listed, templates="none")
    return convert_table(tmp / "l.txt", pictures, tmp / "set", words)


def list_with_spaces_in_labels(pictures: Path, tmp: Path, listed: str) -> Conversion:
    root = renamed(pictures, tmp / "n", str)
    lines = [f"{NAMES.index(name)}/{Path(path).name} {name}\n" for path, name in rows()]
    (tmp / "l.txt").write_text("".join(lines))
    return convert_table(tmp / "l.txt", root, tmp / "set", OWN)


def list_of_commas_and_spaces(pictures: Path, tmp: Path, listed: str) -> Conversion:
    (tmp / "l.txt").write_text("".join(f"{path},{name}\n" for path, name in rows()))
    return convert_table(tmp / "l.txt", pictures, tmp / "set", OWN)


def some_numbers_from_1(pictures: Path, tmp: Path, listed: str) -> Conversion:
    """Only labels of a table say which numbers there are; the list has one more at its end."""
    (tmp / "more.txt").write_text("\n".join((*NAMES, "unicorn")) + "\n")
    lines = ["path,label", *(f"{path},{NAMES.index(name) + 1}" for path, name in rows())]
    (tmp / "l.csv").write_text("\n".join(lines))
    words = Words(classnames=str(tmp / "more.txt"), templates="none", first=1)
    made = convert_table(tmp / "l.csv", pictures, tmp / "set", words)
    assert any("1 of 13 classes have no image" in one for one in made.about_names)
    (made.folder / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    return replace(made, classnames=NAMES)


def json_lines(pictures: Path, tmp: Path, listed: str) -> Conversion:
    lines = [json.dumps({"file_name": path, "label": name}) for path, name in rows()]
    (tmp / "l.jsonl").write_text("\n".join(lines))
    return convert_table(tmp / "l.jsonl", pictures, tmp / "set", OWN)


def parquet_of_numbers(pictures: Path, tmp: Path, listed: str) -> Conversion:
    paths, names = zip(*rows(), strict=True)
    labels = [float(NAMES.index(name)) for name in names]
    pyarrow.parquet.write_table(pyarrow.table({"path": paths, "label": labels}), tmp / "l.parquet")
    words = Words(classnames=listed, templates="none")
    return convert_table(tmp / "l.parquet", pictures, tmp / "set", words)


def flat_names_without_suffix(pictures: Path, tmp: Path, listed: str) -> Conversion:
    lines = ["id,breed", *(f"{Path(path).stem},{name.upper()}" for path, name in rows())]
    (tmp / "l.csv").write_text("\n".join(lines))
    words = Words(classnames=listed, templates="none")
    return convert_table(tmp / "l.csv", pictures, tmp / "set", words)


FORMS = (
    *(plain, named, numbers_from_1, padded_numbers, numbered_names, other_case, upper_suffixes),
    *(without_suffixes, linked_folders, from_a_mac, csv_with_header, csv_without_header),
    *(csv_of_semicolons, quoted_tsv, plain_list, list_with_spaces_in_labels, json_lines),
    *(list_of_commas_and_spaces, some_numbers_from_1),
    *(parquet_of_numbers, flat_names_without_suffix),
)


@pytest.fixture(scope="module")
def expected(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    made = convert_imagefolder(pictures, tmp_path_factory.mktemp("plain") / "set", OWN)
    return figures_of(open_set("mine", made.folder, "classification", ("{c}",)))


@pytest.mark.parametrize("convert", FORMS, ids=lambda one: one.__name__)
def test_same_figures_from_every_form(
    tmp_path: Path,
    pictures: Path,
    listed: str,
    expected: dict[str, object],
    convert: Callable[[Path, Path, str], Conversion],
):
    made = convert(pictures, tmp_path, listed)
    found = open_set("mine", made.folder, "classification", ("{c}",))
    assert figures_of(found) == expected
    assert 0 < expected["top1"] < 1 and expected["n"] == COUNT * len(NAMES)
    assert (made.images, len(made.classnames)) == (COUNT * len(NAMES), len(NAMES))


def test_a_tar_from_a_mac_is_the_same_set(tmp_path: Path, pictures: Path, expected):
    made = convert_imagefolder(pictures, tmp_path / "set", OWN)
    evalset = open_set("mine", made.folder, "classification", ("{c}",))
    members = [("./PaxHeader/x", b"x"), ("._s.png", b"x")]
    for sample in evalset.samples:
        answer = str(sample.label).encode()
        members += [(f"./{sample.key}.PNG", sample.image.read()), (f"._{sample.key}.PNG", b"x")]
        members += [(f"./{sample.key}.cls", answer), (f"./._{sample.key}.cls", b"x")]
    write_tar(made.folder / "test" / "0.tar", members)
    again = open_set("mine", made.folder, "classification", ("{c}",))
    assert figures_of(again) == expected
    assert again.fingerprint == evalset.fingerprint


def coco(texts: dict[str, list[str]], path: Path) -> Path:
    images = [{"id": 90 - n, "file_name": name} for n, name in enumerate(texts)]
    ids = {one["file_name"]: one["id"] for one in images}
    said = [
        {"id": 7 * n, "image_id": ids[name], "caption": text}
        for n, (name, text) in enumerate(
            (name, text) for name, all_ in texts.items() for text in all_
        )
    ]
    path.write_text(json.dumps({"images": images, "annotations": said}))
    return path


def karpathy(texts: dict[str, list[str]], path: Path) -> Path:
    entries = [
        {"filename": name, "split": "test", "sentences": [{"raw": text} for text in all_]}
        for name, all_ in texts.items()
    ]
    path.write_text(json.dumps({"images": [*entries, {"split": "train"}]}))
    return path


def blip(texts: dict[str, list[str]], path: Path) -> Path:
    path.write_text(json.dumps([{"image": name, "caption": all_} for name, all_ in texts.items()]))
    return path


def token(texts: dict[str, list[str]], path: Path) -> Path:
    lines = [f"{name}#{n}\t{text}" for name, all_ in texts.items() for n, text in enumerate(all_)]
    path.with_suffix(".token").write_text("\r\n".join(lines))
    return path.with_suffix(".token")


def caption_table(texts: dict[str, list[str]], path: Path) -> Path:
    with path.with_suffix(".csv").open("w", newline="") as file:
        pairs = [(name, text) for name, all_ in texts.items() for text in all_]
        csv.writer(file).writerows([("image_name", "comment"), *pairs])
    return path.with_suffix(".csv")


def flickr_csv(texts: dict[str, list[str]], path: Path) -> Path:
    """As the Hugging Face hub has Flickr30K."""
    with path.with_suffix(".csv").open("w", newline="") as file:
        rows = [(json.dumps(all_), "test", name, n) for n, (name, all_) in enumerate(texts.items())]
        csv.writer(file).writerows([("raw", "split", "filename", "img_id"), *rows])
    return path.with_suffix(".csv")


CAPTION_FORMS = (coco, karpathy, blip, token, caption_table, flickr_csv)


def test_captions_are_the_same_from_every_form(tmp_path: Path, pictures: Path):
    texts = {
        path.split("/")[1]: [f"a {name}, seen", f'the "{name}"; number {n}']
        for n, (path, name) in enumerate(rows()[:7])
    }
    flat = tmp_path / "flat"
    flat.mkdir()
    for path, _ in rows()[:7]:
        shutil.copy(pictures / path, flat)
    found = set()
    for number, write in enumerate(CAPTION_FORMS):
        listing = write(texts, tmp_path / f"{number}.json")
        made = convert_captions(listing, flat, tmp_path / str(number))
        found.add(open_set("mine", made.folder, "retrieval").fingerprint)
    assert len(found) == 1


@pytest.mark.parametrize("parted", ["|", ";", ",", " | ", "', '", "' '", '", "'])
def test_several_labels_are_the_same_from_every_separator(
    tmp_path: Path, pictures: Path, parted: str
):
    lines = ["path\tlabels"]
    for n, (path, name) in enumerate(rows()):
        quote = next((one for one in "'\"" if one in parted), "")
        written = f"{quote}{name}{parted}{NAMES[n % 3]}{quote}"
        written = f"[{written}]" if quote else written
        lines.append(f"{path}\t{written}" if n % 4 else f"{path}\t")
    (tmp_path / "l.tsv").write_text("\n".join(lines))
    made = convert_table(tmp_path / "l.tsv", pictures, tmp_path / "set", OWN, several=True)
    found = open_set("mine", made.folder, "multilabel", ("{c}",))
    for n, (sample, (_, name)) in enumerate(zip(found.samples, rows(), strict=True)):
        said = {found.classnames[label] for label in sample.labels}
        assert said == ({name, NAMES[n % 3]} if n % 4 else set())
