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
        "hub": given / "hub.parquet",
        "folder": given / "pictures",
    }
    for name, source in sources.items():
        out = tmp_path / name
        rows, unreadable = embed_inputs(model, [source], out)
        assert (rows, len(unreadable)) == (SHARDS * SAMPLES - 1, 1)
        assert [one.removesuffix(".png") for one, _ in unreadable] == ["12"]
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
    embed_inputs(model, sources, whole, progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == 2 * SHARDS * SAMPLES
    for share in ((1, 2), (0, 2)):
        embed_inputs(model, sources, shared, share=share)
    contents = [{p.name: p.read_bytes() for p in out.iterdir()} for out in (whole, shared)]
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


def test_two_inputs_of_one_name_and_a_torn_shard_are_refused(given, model, tmp_path):
    (tmp_path / "other").mkdir()
    tar = given / "runs/download/d/shards/000000.tar"
    (tmp_path / "other/000000.tar").write_bytes(tar.read_bytes()[:-40_000])
    with pytest.raises(InputError, match="two inputs are called '000000'"):
        embed_inputs(model, [tar, tmp_path / "other"], tmp_path / "out")
    with pytest.raises(InputError, match=r"is not a whole tar: .* fetch or write it again"):
        embed_inputs(model, [tmp_path / "other"], tmp_path / "torn")
    assert not list((tmp_path / "torn").glob("*.parquet"))


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
    assert json.loads((out / "000001.unreadable.json").read_text())[0][0] == "12"
