"""What people have already, adopted and verified: samples in, out, left out and why."""

from __future__ import annotations

import csv
import gzip
import hashlib
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from evaclip_model.errors import InputError
from evaclip_model.reading.samples import read_samples
from tasks.adopt.adopt import adopt_sources, inspect_source
from tasks.adopt.config import AdoptConfig
from tasks.adopt.find_source import find_source, source_mark
from tasks.artifacts.artifact import Made
from tasks.index.adopted_shards import read_adopted
from tasks.index.sample_index import SampleIndex
from tasks.progress import report_nothing
from tasks.verify.config import VerifyConfig
from tasks.verify.verify import verify_shards

IMG2DATASET = """
import sys, img2dataset
img2dataset.download(url_list=sys.argv[1], input_format="parquet", url_col="URL",
    caption_col="TEXT", output_format="webdataset", output_folder=sys.argv[2],
    processes_count=1, thread_count=4, number_sample_per_shard=20, enable_wandb=False)
"""


def picture(number: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    colour = (number * 37 % 256, number * 91 % 256, number * 53 % 256)
    Image.new("RGB", (40 + number % 7, 32), colour).save(file, kind)
    return file.getvalue()


def pack(path: Path, samples: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as tar:
        for one in samples:
            tar.write(one)
    return path


def stranger(number: int, **changes: object) -> dict[str, object]:
    """A sample without a record, as CC12M's shards have them."""
    one = {"__key__": f"{number:05d}", "jpg": picture(number), "txt": f"noise {number}"}
    return {name: value for name, value in (one | changes).items() if value is not None}


def configured(**source: Any) -> AdoptConfig:
    return AdoptConfig.from_mapping({"sources": [{"name": "mine", **source}]}, where="test")


def adopted(out: Path, files: Path | str, **source: Any) -> Made:
    out.mkdir(parents=True, exist_ok=True)
    return adopt_sources(configured(files=str(files), **source), out, report_nothing)


def verified(adoption: Path, out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(counts, rows of the index)."""
    made = verify_shards(VerifyConfig(), adoption, out, 1, report_nothing)
    return dict(made.counts), [
        row
        for table in SampleIndex(out).iterate_chunks(
            *("key", "uid", "source", "original_id", "url", "stored_sha256", "flaw")
        )
        for row in table.to_pylist()
    ]


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("name", ["000.tar", "p.csv", "p.parquet", "shards.txt", "b.jpg"])
def test_nothing_waits_for_a_pipe_among_the_files(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    (tmp_path / "b.txt").write_text("a red fox" if name == "b.jpg" else "")
    files = tmp_path / name if name == "shards.txt" else tmp_path
    for use in (inspect_source, lambda files: adopted(tmp_path / "out", files)):
        with pytest.raises(InputError, match=f"{name} is a pipe, not a file"):
            use(str(files))


def test_a_table_reads_no_image_outside_its_folder_unless_it_may(tmp_path: Path) -> None:
    own, kept = tmp_path / "data", tmp_path / "private"
    write_pictures(own / "sub", range(2))
    write_pictures(kept, range(1))
    os.mkfifo(own / "pipe.jpg")
    (own / "link").symlink_to(own / "sub")
    private = kept / "0.jpg"
    away = ("../private/0.jpg", private, f"file://{private}", "sub/../../private/0.jpg")
    paths = ("sub/0.jpg", "link/1.jpg", "sub/../pipe.jpg", *away)
    table = own / "captions.csv"
    table.write_text("image,caption\n" + "".join(f"{path},noise\n" for path in paths))
    found = inspect_source(str(table)).left
    assert (found.pairs, found.reasons) == (2, {"outside_folder": 4, "unreadable_file": 1})
    table.write_text(f"image,caption\n{private},noise\n{away[0]},noise\n")
    with pytest.raises(InputError, match=r"2 outside_folder; .* that may be read in 'within'"):
        adopted(tmp_path / "a", table)
    assert adopted(tmp_path / "b", table, within=str(tmp_path)).counts["mine.samples"] == 2


@pytest.mark.parametrize(
    "braces",
    ["{000..", "{0..9}{0..99999999}", "{0.." + "9" * 5_000 + "}"],
    ids=("open", "many", "long"),
)
def test_braces_that_cannot_be_expanded_are_one_sentence(tmp_path: Path, braces: str) -> None:
    with pytest.raises(InputError, match="braces that cannot be expanded"):
        inspect_source(f"{tmp_path}/{braces}.tar")


def test_shards_are_listed_where_they_lie_and_flawed_samples_cost_themselves(
    tmp_path: Path,
) -> None:
    data = tmp_path / "data"
    samples = [stranger(n) for n in range(20)]
    samples[3] = stranger(3, jpg=None, jpeg=picture(3))
    samples[4] = stranger(4, jpg=None, webp=picture(4, "WEBP"))
    samples[5] = stranger(5, jpg=None)
    samples[6] = stranger(6, txt=None)
    samples[7] = stranger(7, jpg=b"\xff\xd8 nothing")
    samples[8] = stranger(8, txt=b"caf\xe9")
    pack(data / "a/00000.tar", samples)
    pack(data / "b/00000.tar", [stranger(n + 100) for n in range(5)])
    before = digests(data)
    made = adopted(tmp_path / "adopt", data)
    assert made.counts["shards"] == 2
    assert not made.bulk, "nothing was packed"
    counts, rows = verified(tmp_path / "adopt", tmp_path / "verify")
    assert counts["samples"] == 21
    assert {name: n for name, n in counts.items() if name.startswith("bad.")} == {
        "bad.no_image": 1,
        "bad.no_caption": 1,
        "bad.undecodable": 1,
        "bad.caption_not_utf8": 1,
    }
    assert {row["source"] for row in rows} == {"mine"}
    assert len({row["uid"] for row in rows}) == 25
    assert digests(data) == before


def test_a_sample_keeps_its_uid_wherever_its_shard_lies(tmp_path: Path) -> None:
    pack(tmp_path / "here/a/0.tar", [stranger(n) for n in range(3)])
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    uids = []
    for place in ("here", "there"):
        adopted(tmp_path / f"adopt-{place}", tmp_path / place / "**/*.tar")
        _, rows = verified(tmp_path / f"adopt-{place}", tmp_path / f"verify-{place}")
        uids.append([row["uid"] for row in rows])
    assert uids[0] == uids[1]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """An address on loopback behind which lies `tmp_path / "web"`."""
    folder = tmp_path / "web"
    folder.mkdir()
    handler = partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_shards_of_plain_img2dataset_are_adopted_with_their_addresses(
    tmp_path: Path, web: str
) -> None:
    for number in range(30):
        (tmp_path / f"web/{number}.jpg").write_bytes(picture(number))
    urls = [f"{web}/{number}.jpg" for number in range(30)]
    table = pa.table({"URL": [*urls, f"{web}/gone.jpg"], "TEXT": [f"noise {n}" for n in range(31)]})
    pq.write_table(table, tmp_path / "list.parquet")
    command = [sys.executable, "-c", IMG2DATASET, tmp_path / "list.parquet", tmp_path / "laion"]
    subprocess.run(command, check=True, capture_output=True)
    before = digests(tmp_path / "laion")
    adopted(tmp_path / "adopt", tmp_path / "laion")
    counts, rows = verified(tmp_path / "adopt", tmp_path / "verify")
    assert counts["samples"] == 30
    assert {row["url"] for row in rows} == set(urls)
    without_scheme = urls[0].partition("://")[2]
    expected = hashlib.md5(f"{without_scheme}\nnoise 0".encode()).hexdigest()
    assert expected in {row["uid"] for row in rows}, "the uid that a merge would have given"
    assert digests(tmp_path / "laion") == before


def test_shards_at_a_url_are_verified_from_there(tmp_path: Path, web: str) -> None:
    pack(tmp_path / "web/00000.tar", [stranger(n) for n in range(4)])
    adopted(tmp_path / "adopt", f"{web}/00000.tar")
    counts, _ = verified(tmp_path / "adopt", tmp_path / "verify")
    assert counts["samples"] == 4
    verdicts = json.loads((tmp_path / "verify/checked.json").read_text())
    assert [verdict["path"] for verdict in verdicts] == [f"{web}/00000.tar"]


def write_pictures(folder: Path, numbers: range) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{number}.jpg").write_bytes(picture(number))


def test_a_folder_of_images_with_captions_beside_them_is_packed_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "photos/2024"
    write_pictures(folder, range(6))
    for number in range(5):
        (folder / f"{number}.txt").write_text(f"noise {number}\n")
    (folder / "4.txt").write_bytes(b"caf\xe9")
    (folder / "alone.txt").write_text("no picture")
    made = adopted(tmp_path / "adopt", tmp_path / "photos")
    reasons = {name: n for name, n in made.counts.items() if name.startswith("left_out.")}
    assert reasons == {
        "left_out.no_caption": 1,
        "left_out.no_image": 1,
        "left_out.caption_not_utf8": 1,
    }
    counts, rows = verified(tmp_path / "adopt", tmp_path / "verify")
    assert counts["samples"] == 4
    assert rows[0]["original_id"] == "2024/0.jpg"
    assert rows[0]["stored_sha256"] == hashlib.sha256(picture(0)).hexdigest()


TABLES = {
    "captions.csv": 'image,caption\nimg/0.jpg,1984\nimg/1.jpg,"a cat, a dog"\nimg/9.jpg,gone\n,x\n',
    "captions.tsv": "image\tcaption\nimg/0.jpg\t1984\n"
    "img/1.jpg\ta cat, a dog\nimg/9.jpg\tgone\n\tx\n",
    "open_clip.csv": "filepath\ttitle\n"
    "img/0.jpg\t1984\nimg/1.jpg\ta cat, a dog\nimg/9.jpg\tgone\n\tx\n",
    "results.csv": "Image_Name; comment\n"
    "img/0.jpg; 1984\nimg/1.jpg; a cat, a dog\nimg/9.jpg; gone\n; x\n",
    "metadata.jsonl": '{"file_name": "img/0.jpg", "text": 1984}\n'
    '{"file_name": "img/1.jpg", "text": "a cat, a dog"}\n'
    '{"file_name": "img/9.jpg", "text": "gone"}\n{"text": "x"}\n',
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("named", ["table", "folder"])
def test_a_table_of_paths_is_packed_with_its_lines(tmp_path: Path, name: str, named: str) -> None:
    write_pictures(tmp_path / "data/img", range(3))
    (tmp_path / "data" / name).write_text(TABLES[name])
    files = tmp_path / "data" / name if named == "table" else tmp_path / "data"
    made = adopted(tmp_path / "adopt", files)
    assert (made.counts["left_out.missing_file"], made.counts["left_out.no_image"]) == (1, 1)
    first = json.loads((tmp_path / "adopt/left_out.jsonl").read_text().splitlines()[0])
    line = 3 if name.endswith("jsonl") else 4
    assert first["where"] == f"{tmp_path}/data/{name}, line {line}"
    [shard] = read_adopted(tmp_path / "adopt")
    read = list(webdataset.WebDataset(shard.location, shardshuffle=False))
    assert [sample["txt"] for sample in read] == [b"1984", b"a cat, a dog"]
    assert read[0]["jpg"] == picture(0)


@pytest.mark.parametrize("form", ["struct", "bytes"])
def test_parquet_with_images_is_packed_and_a_bad_row_costs_itself(
    tmp_path: Path, form: str
) -> None:
    images: list[Any] = [picture(0), picture(1, "PNG"), None, b"no image at all"]
    if form == "struct":
        images = [{"bytes": image, "path": None} for image in images]
    broken = pa.array([b"a cat", b"caf\xe9", b"x", b"y"], pa.binary())
    captions = pa.StringArray.from_buffers(4, *broken.buffers()[1:3])
    pq.write_table(pa.table({"image": images, "text": captions}), tmp_path / "a.parquet")
    made = adopted(tmp_path / "adopt", tmp_path / "*.parquet")
    reasons = {name: n for name, n in made.counts.items() if name.startswith("left_out.")}
    assert sum(reasons.values()) == 3
    assert reasons["left_out.caption_not_utf8"] == 1
    [shard] = read_adopted(tmp_path / "adopt")
    [sample] = webdataset.WebDataset(shard.location, shardshuffle=False)
    assert (sample["jpg"], sample["txt"]) == (picture(0), b"a cat")


def test_several_captions_of_a_row_are_several_samples(tmp_path: Path) -> None:
    rows = {"image": [picture(0), picture(1)], "caption": [["a cat", "a pet"], ["a dog"]]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    adopted(tmp_path / "adopt", tmp_path / "a.parquet")
    [shard] = read_adopted(tmp_path / "adopt")
    read = webdataset.WebDataset(shard.location, shardshuffle=False)
    assert [sample["txt"] for sample in read] == [b"a cat", b"a pet", b"a dog"]


@pytest.mark.parametrize(
    "cell", ['["a cat", "a pet"]', "['a cat', 'a pet']", "['a cat'\n 'a pet']"]
)
def test_a_list_of_captions_in_a_csv_is_several_samples(tmp_path: Path, cell: str) -> None:
    write_pictures(tmp_path, range(2))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "raw"), ("0.jpg", cell), ("1.jpg", "[1984]")])
    adopted(tmp_path / "adopt", tmp_path / "a.csv", caption="raw")
    [shard] = read_adopted(tmp_path / "adopt")
    read = webdataset.WebDataset(shard.location, shardshuffle=False)
    assert [sample["txt"] for sample in read] == [b"a cat", b"a pet", b"[1984]"]


def test_packing_again_gives_the_same_bytes_whatever_a_killed_run_left(tmp_path: Path) -> None:
    write_pictures(tmp_path / "data", range(9))
    for number in range(9):
        (tmp_path / f"data/{number}.txt").write_text(f"noise {number}")
    adopted(tmp_path / "one", tmp_path / "data")
    torn = tmp_path / "two/packed/mine/000000.tar"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"torn")
    (torn.parent / "000007.tar").write_bytes(b"of other settings")
    adopted(tmp_path / "two", tmp_path / "data")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def make_nothing(folder: Path) -> None:
    pass


def make_images_alone(folder: Path) -> None:
    write_pictures(folder, range(2))


def make_packed_shards(folder: Path) -> None:
    (folder / "0.tar.gz").write_bytes(b"x")


def make_shards_without_captions(folder: Path) -> None:
    pack(folder / "0.tar", [stranger(n, txt=None, cls="7") for n in range(3)])


def make_addresses(folder: Path) -> None:
    (folder / "a.csv").write_text("url,caption\nhttp://a.example/1.jpg,a cat\n")


def make_other_columns(folder: Path) -> None:
    (folder / "a.csv").write_text("bild,caption\n1.jpg,a cat\n")


def make_images_and_table(folder: Path) -> None:
    write_pictures(folder, range(2))
    (folder / "0.txt").write_text("a cat")
    (folder / "a.csv").write_text("image,caption\n1.jpg,a cat\n")


def make_documents(folder: Path) -> None:
    (folder / "a.pdf").write_bytes(b"x")


def make_arrow(folder: Path) -> None:
    """What `save_to_disk` of Hugging Face's datasets writes."""
    (folder / "data-00000-of-00001.arrow").write_bytes(b"x")
    (folder / "state.json").write_text('{"_data_files": []}')


def make_shards_by_input_and_output(folder: Path) -> None:
    pack(folder / "0.tar", [{"__key__": "a", "input.jpg": picture(0), "outputs.txt": "a cat"}])


def make_two_columns_of_bytes(folder: Path) -> None:
    rows = {"small": [picture(0)], "large": [picture(1)], "caption": ["a cat"]}
    pq.write_table(pa.table(rows), folder / "a.parquet")


def make_lost_images(folder: Path) -> None:
    (folder / "a.csv").write_text("image,caption\n1.jpg,a cat\n2.jpg,a dog\n")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (make_nothing, "there is no file in"),
        (make_images_alone, r"2 images in .*, but no captions: put NAME\.txt"),
        (make_packed_shards, r"1 shards are compressed, the first is .*0\.tar\.gz: unpack"),
        (make_shards_without_captions, r"no image with a \.txt beside it .* \.cls, \.jpg"),
        (make_addresses, r"holds addresses of images \(url\), not images"),
        (make_other_columns, r"which column is its image\? .* bild, caption"),
        (make_images_and_table, "set form = 'folder'"),
        (make_two_columns_of_bytes, r"which column is its image\? .* small, large, caption"),
        (make_documents, r"1 files \(\.pdf\), but no shards"),
        (make_arrow, r"2 files \(\.arrow, \.json\), .* \(which to_parquet makes of \.arrow"),
        (make_shards_by_input_and_output, r"\.input\.jpg, .* NAME ends at its first dot"),
        (make_lost_images, r"no image with a caption \(2 missing_file; the first is .*, line 2"),
    ],
)
def test_what_cannot_be_adopted_is_one_sentence(tmp_path: Path, make: Any, sentence: str) -> None:
    (tmp_path / "data").mkdir()
    make(tmp_path / "data")
    with pytest.raises(InputError, match=sentence) as caught:
        adopted(tmp_path / "adopt", tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "adopt/adopted.jsonl").exists()


def test_a_table_called_txt_is_told_how_to_be_called(tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("image,caption\n0.jpg,a cat\n")
    with pytest.raises(InputError, match=r"line 1: image,caption \(a table ends in \.csv\)"):
        adopted(tmp_path / "adopt", tmp_path / "captions.txt")


@pytest.mark.parametrize("named", ["photos [2024]", "photos [2024]/captions.csv"])
def test_a_name_that_is_there_is_no_pattern(tmp_path: Path, named: str) -> None:
    write_pictures(tmp_path / "photos [2024]", range(1))
    (tmp_path / "photos [2024]/captions.csv").write_text("image,caption\n0.jpg,a cat\n")
    assert adopted(tmp_path / "adopt", tmp_path / named).counts["mine.samples"] == 1


def test_every_image_that_is_packed_is_one_to_who_reads_the_shard(tmp_path: Path) -> None:
    forms = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
    for form in forms:
        (tmp_path / form).write_bytes(picture(len(form), form))
    rows = "".join(f"{form},noise {form}\n" for form in forms)
    (tmp_path / "a.csv").write_text(f"image,caption\n{rows}")
    adopted(tmp_path / "adopt", tmp_path / "a.csv")
    [shard] = read_adopted(tmp_path / "adopt")
    assert [one.flaw for one in read_samples(Path(shard.location))] == [None] * len(forms)


def test_files_of_img2dataset_are_a_folder_beside_their_table_of_addresses(tmp_path: Path) -> None:
    """Its default `output_format`, with the parquet and the statistics of every part."""
    write_pictures(tmp_path / "00000", range(2))
    for number in range(2):
        (tmp_path / f"00000/{number}.txt").write_text(f"noise {number}")
        (tmp_path / f"00000/{number}.json").write_text('{"status": "success"}')
    rows = {"url": ["http://a.example/0.jpg"], "caption": ["noise 0"], "status": ["success"]}
    pq.write_table(pa.table(rows), tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text('{"count": 2}')
    assert adopted(tmp_path / "adopt", tmp_path).counts["mine.samples"] == 2


def test_columns_of_a_hub_files_shards_are_known(tmp_path: Path) -> None:
    pq.write_table(pa.table({"jpg": [picture(0)], "txt": ["a cat"]}), tmp_path / "a.parquet")
    assert adopted(tmp_path / "adopt", tmp_path).counts["mine.samples"] == 1


def test_of_several_columns_of_bytes_the_one_called_so_is_the_image(tmp_path: Path) -> None:
    rows = {"hash": [b"xy"], "thumbnail": [picture(0)], "image": [picture(1)], "caption": ["a cat"]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    adopted(tmp_path / "adopt", tmp_path / "a.parquet")
    [shard] = read_adopted(tmp_path / "adopt")
    assert [bytes(one.image) for one in read_samples(Path(shard.location))] == [picture(1)]


def test_a_tar_may_end_in_capitals_and_lie_in_a_folder_named_by_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "2024-05-01T10:30"
    pack(folder / "A.tar", [stranger(0)]).rename(folder / "A.TAR")
    adopted(tmp_path / "adopt", folder)
    assert verified(tmp_path / "adopt", tmp_path / "verify")[0]["samples"] == 1


@pytest.mark.parametrize("column", ["image", "caption"])
def test_a_column_of_what_has_none_is_refused(tmp_path: Path, column: str) -> None:
    pack(tmp_path / "s/0.tar", [stranger(0)])
    with pytest.raises(InputError, match=r"'shards' has no columns: leave 'image' and 'caption'"):
        adopted(tmp_path / "adopt", tmp_path / "s", **{column: "prompt"})


def test_nan_is_no_caption(tmp_path: Path) -> None:
    write_pictures(tmp_path, range(2))
    rows = [{"image": "0.jpg", "caption": float("nan")}, {"image": "1.jpg", "caption": "NaN"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = adopted(tmp_path / "adopt", tmp_path / "a.jsonl")
    assert (made.counts["left_out.no_caption"], made.counts["mine.samples"]) == (1, 1)
    floats = pa.array([1984.5, float("nan")])
    pq.write_table(pa.table({"image": [picture(0)] * 2, "caption": floats}), tmp_path / "a.parquet")
    made = adopted(tmp_path / "second", tmp_path / "a.parquet")
    assert (made.counts["left_out.no_caption"], made.counts["mine.samples"]) == (1, 1)


def test_a_list_that_names_missing_shards_is_refused_with_their_number(tmp_path: Path) -> None:
    pack(tmp_path / "a/0.tar", [stranger(0)])
    listed = tmp_path / "shards.txt"
    listed.write_text("# mine\na/0.tar\na/1.tar\na/2.tar\n")
    with pytest.raises(InputError, match=r"2 of the 3 files .* the first is in line 3: a/1\.tar"):
        adopted(tmp_path / "adopt", listed)
    listed.write_text("a/0.tar\n")
    assert adopted(tmp_path / "adopt", listed).counts["shards"] == 1


class _Away(Exception):
    """An error of a store's own kind, as botocore has."""


class Away(fsspec.AbstractFileSystem):
    """An object store that knows a list and does not hand it out."""

    protocol = "away"

    def isdir(self, path: str) -> bool:
        return False

    def cat_file(self, path: str, *_: object, **__: object) -> bytes:
        raise _Away(f"no endpoint for {path}")


def test_a_list_at_a_store_that_does_not_answer_is_one_sentence(tmp_path: Path) -> None:
    fsspec.register_implementation("away", Away, clobber=True)
    with pytest.raises(InputError, match=r"away://a/list.txt cannot be read as a list \(no endpo"):
        adopted(tmp_path / "adopt", "away://a/list.txt")


def test_a_list_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    pack(tmp_path / "a/0.tar", [stranger(0)])
    listed = tmp_path / "shards.txt"
    listed.write_text("a/0.tar\n", encoding="utf-8-sig")
    assert adopted(tmp_path / "adopt", listed).counts["shards"] == 1


def test_a_range_in_braces_names_every_shard_of_it(tmp_path: Path) -> None:
    for number in range(3):
        pack(tmp_path / f"{number:05d}.tar", [stranger(number)])
    assert adopted(tmp_path / "one", tmp_path / "{00000..00002}.tar").counts["shards"] == 3
    with pytest.raises(InputError, match=r"no file matches '.*00003\.tar'"):
        adopted(tmp_path / "two", tmp_path / "{00000..00003}.tar")


def test_a_shard_that_changed_since_is_refused_and_its_source_has_another_mark(
    tmp_path: Path,
) -> None:
    data = tmp_path / "data"
    for name in ("0", "1"):
        pack(data / f"{name}.tar", [stranger(int(name))])
    [source] = configured(files=str(data)).sources
    mark = source_mark(find_source(source))
    adopted(tmp_path / "adopt", data)
    pack(data / "1.tar", [stranger(7)])
    assert source_mark(find_source(source)) != mark
    with pytest.raises(InputError, match=r"1 of 2 adopted shards changed .*data/1\.tar"):
        verify_shards(VerifyConfig(), tmp_path / "adopt", tmp_path / "verify", 1, report_nothing)
    assert not (tmp_path / "verify").exists()


def test_names_and_captions_of_every_spelling_are_taken_from_tars(tmp_path: Path) -> None:
    members = {
        "./v1.0/a.JPG": picture(1),
        "./v1.0/a.TXT": b"\xef\xbb\xbfupper",
        "b.jpeg": picture(2),
        "b.caption": b"as trainers of other models write them",
        "c.png": picture(3, "PNG"),
        "c.text": b"text",
        "c.json": b'{"caption": "the record says otherwise"}',
        "d.jpg": b"",
        "d.txt": b"nothing to see",
    }
    (tmp_path / "s").mkdir()
    with tarfile.open(tmp_path / "s/0.tar", "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    adopted(tmp_path / "out", tmp_path / "s")
    counts, rows = verified(tmp_path / "out", tmp_path / "verified")
    assert counts["samples"] == 3
    assert {row["key"]: row["flaw"] for row in rows}["d"] == "undecodable"
    said = [sample.caption for sample in read_samples(tmp_path / "s/0.tar")]
    assert said == ["upper", members["b.caption"].decode(), "text", "nothing to see"]


def test_a_path_may_hold_what_other_programs_take_for_the_end_of_a_line(tmp_path: Path) -> None:
    pack(tmp_path / "a\u2028b/0\x850.tar", [stranger(0)])
    adopted(tmp_path / "adopt", tmp_path / "a\u2028b")
    assert [one.name for one in read_adopted(tmp_path / "adopt")] == ["0\x850.tar"]


def test_a_compressed_tar_by_a_plain_name_is_said_to_be_one(tmp_path: Path) -> None:
    path = pack(tmp_path / "0.tar", [stranger(1)])
    path.write_bytes(gzip.compress(path.read_bytes()))
    found = inspect_source(str(path))
    assert found is not None
    assert "it is compressed by gzip: unpack it" in found.left.first


def test_links_are_followed_once_and_a_broken_one_costs_itself(tmp_path: Path) -> None:
    top = tmp_path / "top"
    (tmp_path / "elsewhere").mkdir()
    top.mkdir()
    write_pictures(tmp_path / "elsewhere", range(2))
    (tmp_path / "elsewhere/0.txt").write_text("zero")
    (tmp_path / "elsewhere/1.caption").write_text("one")
    (top / "link").symlink_to("../elsewhere")
    (top / "back").symlink_to("..")
    (top / "gone.jpg").symlink_to("/nowhere/at/all.jpg")
    (top / "gone.txt").write_text("x")
    counts = adopted(tmp_path / "out", top).counts
    assert verified(tmp_path / "out", tmp_path / "verified")[0]["samples"] == 2
    assert counts["left_out.missing_file"] == 1


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize(
    ("images", "captions", "expected"),
    [
        ([[{"bytes": picture(1)}], [{}, {}], []], ["a", "b", "c"], "no_image several_images"),
        ([picture(1), picture(2)], [[{"raw": "x"}, {"raw": "y"}], [{"raw": "z"}]], "no_caption"),
        ([1, 2.5], ["a", "b"], "not_an_image"),
        (pa.nulls(2), ["a", "b"], "no_image"),
        ([picture(1), picture(2)], pa.array([1984, None]), "no_caption"),
        (pa.array([{"bytes": None, "path": None}, None], IMAGE), ["a", "b"], "no_image"),
    ],
    ids=["lists", "dicts", "numbers", "nulls", "years", "structs"],
)
def test_a_parquet_row_of_any_shape_costs_itself(
    tmp_path: Path, images: Any, captions: Any, expected: str
) -> None:
    pq.write_table(pa.table({"image": images, "caption": captions}), tmp_path / "a.parquet")
    found = inspect_source(str(tmp_path / "a.parquet"))
    assert found is not None
    assert sorted(found.left.reasons) == expected.split()


def test_paths_that_windows_wrote_are_found_and_lead_out_no_more_than_others(
    tmp_path: Path,
) -> None:
    write_pictures(tmp_path / "in/img", range(1))
    write_pictures(tmp_path, range(1))
    lines = ["image,caption", "img\\0.jpg,a", "..\\0.jpg,b", "img\\9.jpg,c"]
    (tmp_path / "in/a.csv").write_text("\n".join(lines))
    found = inspect_source(str(tmp_path / "in/a.csv"))
    assert found is not None
    assert found.left.pairs == 1
    assert found.left.reasons == {"outside_folder": 1, "missing_file": 1}


def test_json_in_a_folder_is_a_table_only_where_no_other_is(tmp_path: Path) -> None:
    write_pictures(tmp_path / "a", range(2))
    rows = [{"image": f"{number}.jpg", "caption": "x"} for number in range(2)]
    (tmp_path / "a/captions.json").write_text(json.dumps(rows))
    found = inspect_source(str(tmp_path / "a"))
    assert found is not None
    assert found.left.pairs == 2
    (tmp_path / "a/captions.csv").write_text("image,caption\n0.jpg,y\n")
    found = inspect_source(str(tmp_path / "a"))
    assert found is not None
    assert found.left.pairs == 1
    for name in ("0.json", "0.txt", "1.txt"):
        (tmp_path / "a" / name).write_text("{}")
    for name in ("captions.csv", "captions.json"):
        (tmp_path / "a" / name).unlink()
    found = inspect_source(str(tmp_path / "a"))
    assert found is not None
    assert (found.form, found.left.pairs) == ("folder", 2)


def test_json_lines_may_list_captions_and_names_may_be_no_utf8(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/names"
    os.mkdir(folder)
    for name in (b"1.jpg", b"\xfe.jpg"):
        Path(os.fsdecode(folder + b"/" + name)).write_bytes(picture(1))
    Path(os.fsdecode(folder + b"/1.txt")).write_text("one")
    found = inspect_source(os.fsdecode(folder))
    assert found is not None
    assert (found.left.pairs, found.left.reasons["no_caption"]) == (1, 1)
    found.left.first.encode()
    write_pictures(tmp_path, range(2))
    lines = [{"image": "0.jpg", "caption": ["a", None, "b"]}, {"image": "1.jpg", "caption": []}]
    lines += [{"image": "1.jpg", "caption": {"en": "an object is no text"}}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = inspect_source(str(tmp_path / "a.jsonl"))
    assert found is not None
    assert (found.left.pairs, found.left.reasons["no_caption"]) == (2, 2)
