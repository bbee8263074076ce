"""Features of folders, tables and shards for other programs: in parts, once, as the pipeline's."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from evaclip_model import InputError, create_model, save_model
from evaclip_model.reading.samples import read_samples
from evaclip_model.zeroshot import embed_files
from evaclip_model.zeroshot.embed_files import embed_inputs
from tasks.embed.config import EmbedConfig
from tasks.embed.embed import embed_samples
from tasks.progress import report_nothing
from tests.tasks.embed.pictures import TINY, verify_pictures

SHARDS, SAMPLES = 3, 40


@pytest.fixture(scope="module")
def model():
    return create_model(TINY, seed=3).eval()


@pytest.fixture(scope="module")
def given(tmp_path_factory, model):
    """Shards, a folder of their pictures, and tables of these; in one sample there is no image."""
    root = tmp_path_factory.mktemp("given")
    save_model(model, root / "tiny")
    verify_pictures(root / "runs", SHARDS, SAMPLES)
    tars = sorted((root / "runs/download/d/shards").glob("*.tar"))
    rows = []
    (root / "pictures").mkdir()
    for one in (one for tar in tars for one in read_samples(tar)):
        (root / "pictures" / f"{one.key}.png").write_bytes(one.image)
        rows.append({"uid": one.key, "path": f"pictures/{one.key}.png", "caption": one.caption})
    with (root / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (root / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = [(root / row["path"]).read_bytes() for row in rows]
    named = {"key": [row["uid"] for row in rows], "text": [row["caption"] for row in rows]}
    images = [{"bytes": one, "path": None} for one in content]
    pq.write_table(pa.table({**named, "image": images}), root / "hub.parquet")
    return root


def vectors(out, column):
    """Id -> feature, of all parts."""
    table = pa.concat_tables(pq.read_table(part) for part in sorted(out.glob("*.parquet")))
    return dict(zip(table["id"].to_pylist(), table[column].to_pylist(), strict=True))


def test_every_form_gives_the_bits_of_the_pipelines_stage(given, model, tmp_path):
    (verified,) = (given / "runs" / "verify").iterdir()
    config, spec = EmbedConfig(models=("tiny",)), str(given / "tiny")
    embed_samples(config, "tiny", spec, verified, tmp_path / "stage", report_nothing)
    stage = pa.concat_tables(
        pq.read_table(file) for file in sorted((tmp_path / "stage/features").glob("*.parquet"))
    )
    expected = stage.select(["uid", "image", "text", "similarity"]).to_pylist()
    by_uid = {one["uid"]: one for one in expected}
    sources = {
        "tars": given / "runs/download/d/shards",
        "csv": given / "table.csv",
        "jsonl": given / "table.jsonl",
        "hub": given / "hub.parquet",
        "folder": given / "pictures",
    }
    for name, source in sources.items():
        out = tmp_path / name
        rows, unreadable = embed_inputs(model, [source], out)
        ((bad, why),) = unreadable
        assert (rows, bad.removesuffix(".png")) == (SHARDS * SAMPLES - 1, "12")
        assert why == "these bytes are not an image of a known format"
        for column in ("image",) if name == "folder" else ("image", "text", "similarity"):
            found = {key.removesuffix(".png"): value for key, value in vectors(out, column).items()}
            assert found == {uid: one[column] for uid, one in by_uid.items()}, (name, column)


def test_shares_of_a_folder_are_together_the_whole_and_nothing_is_made_twice(
    given, model, tmp_path, monkeypatch
):
    monkeypatch.setattr(embed_files, "PART_ROWS", 16)
    sources = [given / "runs/download/d/shards", given / "table.csv"]
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    seen = []
    embed_inputs(model, sources, whole, progress=lambda *said: seen.append(said))
    assert seen == sorted(seen) and seen[-1] == (2 * SHARDS * SAMPLES, 1)
    for share in ((1, 2), (0, 2)):
        embed_inputs(model, sources, shared, share=share)
    contents = [{p.name: p.read_bytes() for p in out.glob("*.*")} for out in (whole, shared)]
    assert contents[0] == contents[1]
    assert len(list(whole.glob("*.parquet"))) == SHARDS + 8
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    monkeypatch.setattr(embed_files, "_write_part", None)
    assert embed_inputs(model, sources, whole)[0] == 2 * SHARDS * SAMPLES - 2
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir()} == before


def test_another_model_and_a_changed_input_are_encoded_anew(given, model, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(given / "pictures", folder)
    embed_inputs(model, [folder], tmp_path / "out")
    first = vectors(tmp_path / "out", "image")
    embed_inputs(create_model(TINY, seed=4).eval(), [folder], tmp_path / "out")
    other = vectors(tmp_path / "out", "image")
    assert first.keys() == other.keys() and first["00.png"] != other["00.png"]
    shutil.copy(folder / "01.png", folder / "00.png")
    embed_inputs(model, [folder], tmp_path / "out")
    again = vectors(tmp_path / "out", "image")
    assert again["00.png"] == again["01.png"] == first["01.png"]


def test_what_would_mix_two_collections_is_refused(given, model, tmp_path):
    tar, out = given / "runs/download/d/shards/000000.tar", tmp_path / "out"
    (tmp_path / "000000.tar").write_bytes(tar.read_bytes())
    with pytest.raises(InputError, match="two inputs are called '000000'"):
        embed_inputs(model, [tar, tmp_path / "000000.tar"], out)
    assert not out.exists()
    embed_inputs(model, [tar], out)
    with pytest.raises(InputError, match=r"000000\.parquet is of none of these inputs"):
        embed_inputs(model, [given / "table.csv"], out)


def test_what_is_bad_is_counted_and_costs_itself_alone(given, model, tmp_path):
    tar = given / "runs/download/d/shards/000000.tar"
    (tmp_path / "torn.tar").write_bytes(tar.read_bytes()[:-40_000])
    shutil.copy(given / "pictures/00.png", tmp_path)
    odd = ["00.png", "../00.png", "nothing.png", "0\0.png", "x" * 300, "", "00.png"]
    with (tmp_path / "odd.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "caption"], *zip(odd, "abcdefg", strict=True)])
        file.write("00.png,red, blue\n")
    sources = [tmp_path / "torn.tar", tmp_path / "odd.csv"]
    rows, unreadable = embed_inputs(model, sources, tmp_path / "out")
    bad = dict(unreadable)
    assert bad.pop("torn.tar").startswith("not a whole tar: ")
    assert (bad["1"], bad["2"], bad["5"]) == ("outside_folder", "missing_file", "no_image")
    assert bad["7"] == "wrong_number_of_columns" and set(bad) == set("123457")
    torn = pq.read_table(tmp_path / "out/torn.parquet")
    assert 0 < len(torn) < SAMPLES and rows == len(torn) + 2
    assert torn.column_names == pq.read_table(tmp_path / "out/odd-000000.parquet").column_names


def test_an_image_without_a_caption_has_a_vector_and_a_text_has_no_image(given, model, tmp_path):
    with webdataset.TarWriter(str(tmp_path / "bare.tar")) as tar:
        for key in ("00", "01"):
            image = (given / f"pictures/{key}.png").read_bytes()
            tar.write({"__key__": key, "png": image, **({"txt": "rain"} if key == "01" else {})})
    (tmp_path / "lines.txt").write_text("rain\n\ntwo dogs\n")
    sources = [tmp_path / "bare.tar", tmp_path / "lines.txt"]
    rows, unreadable = embed_inputs(model, sources, tmp_path / "out")
    assert (rows, list(unreadable)) == (4, [("1", "no_caption")])
    bare, lines = (
        pq.read_table(file).to_pylist() for file in sorted((tmp_path / "out").glob("*.parquet"))
    )
    assert [one["text"] is None for one in bare] == [True, False]
    assert [one["similarity"] is None for one in bare] == [True, False]
    assert all(one["image"] is None and one["similarity"] is None for one in lines)
    assert [one["caption"] for one in lines] == ["rain", "two dogs"]
    assert lines[0]["text"] == bare[1]["text"] and bare[0]["image"] != bare[1]["image"]


@pytest.mark.parametrize(
    ("name", "head"),
    [("a.csv", "Image, title"), ("b.csv", "filepath\ttitle"), ("c.csv", "img_path;captions")],
)
def test_a_strangers_table_loses_no_column(given, model, tmp_path, name, head):
    (tmp_path / "sub").mkdir()
    shutil.copy(given / "pictures/00.png", tmp_path / "sub")
    sign = next(one for one in "\t;," if one in head)
    (tmp_path / name).write_text(f"{head}\nsub\\00.png{sign}rain\n")
    assert embed_inputs(model, [tmp_path / name], tmp_path / "out")[0] == 1
    [row] = pq.read_table(next((tmp_path / "out").glob("*.parquet"))).to_pylist()
    assert row["caption"] == "rain" and row["image"] and row["text"]


def test_where_nothing_can_be_encoded_the_work_ends_early(model, tmp_path, monkeypatch):
    monkeypatch.setattr(embed_files, "AT_ONCE", 8)
    (tmp_path / "wrong.csv").write_text("path\n" + "nowhere.png\n" * 100)
    seen = []
    with pytest.raises(InputError, match=r"none of 8 rows can be encoded \(0: missing_file\)"):
        embed_inputs(
            model,
            [tmp_path / "wrong.csv"],
            tmp_path / "out",
            progress=lambda *said: seen.append(said),
        )
    assert not seen and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        ("csv", b"a,b\n1,2\n", "has columns a, b: expected one of image"),
        ("csv", b"path\n", "is empty"),
        ("csv", b"path\n\xff\n", r"cannot be read as a table \(behind row 0: .*UTF-8"),
        ("jsonl", b"[1]\n", r"\(behind row 0: expected an object a line"),
        ("jsonl", b'{"path": "a.jpg"}\n{"path\n', r"cannot be read as a table \(behind row 0"),
    ],
)
def test_a_table_that_is_none_is_refused_before_anything_is_made(
    suffix, content, message, model, tmp_path
):
    odd = tmp_path / f"odd.{suffix}"
    odd.write_bytes(content)
    with pytest.raises(InputError, match=message):
        embed_inputs(model, [odd], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_killed_in_a_part_the_same_command_goes_on_to_the_same_bytes(given, model, tmp_path):
    shards = given / "runs/download/d/shards"
    embed_inputs(model, [shards], tmp_path / "whole")
    out = tmp_path / "out"
    words = ["-m", "evaclip_model.cli", "embed", shards, "--model", given / "tiny", "--out", out]
    with subprocess.Popen([sys.executable, *map(str, words)]) as process:
        deadline = time.monotonic() + 200
        while not list(out.glob(".*.parquet.*")):  # one is being written
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert len(list(out.glob("*[0-9].parquet"))) < SHARDS
    embed_inputs(model, [shards], out)
    for part in (tmp_path / "whole").iterdir():
        assert (out / part.name).read_bytes() == part.read_bytes()
    assert sorted(p.name for p in out.iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )
    assert json.loads((out / "000001.unreadable.json").read_text())[0][0] == "12"
