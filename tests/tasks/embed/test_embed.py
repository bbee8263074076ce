"""Features of small real shards: the model's own, whatever ranks, kills and shards there are."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from PIL import Image

from evaclip_model.create import create_model
from evaclip_model.errors import InputError
from evaclip_model.files import write_atomically
from evaclip_model.reading.transform import image_transform
from evaclip_model.tokenizer.tokenizer import tokenize
from evaclip_model.weights.load import save_model
from tasks.artifacts.artifact import Artifact
from tasks.embed.config import FEATURES, EmbedConfig
from tasks.embed.embed import embed_samples, read_scores
from tasks.embed.embed_shard import EmbedJob, embed_share
from tasks.embed.search import Searched, Wanted, read_feature, search_features
from tasks.index.sample_index import read_verdicts
from tasks.progress import report_nothing
from tests.tasks.embed.pictures import CAPTIONS, TINY, verify_pictures


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(create_model(TINY, seed=3), folder)
    return folder


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Two shards of five samples; the third of the second one has no image that can be decoded."""
    return verify_pictures(tmp_path_factory.mktemp("runs"), shards=2, samples=5)


def embed(verified: Artifact, model: Path, out: Path, **machine: int) -> dict[str, int | float]:
    config = EmbedConfig(models=(str(model),))
    return dict(
        embed_samples(
            *(config, "tiny", str(model), verified.folder, out, report_nothing), **machine
        ).counts
    )


def test_features_are_those_of_the_model_and_belong_to_their_samples(verified, model, tmp_path):
    counts = embed(verified, model, tmp_path)
    assert counts["samples"] == 9
    table = pq.read_table(tmp_path / FEATURES / "000001.parquet")
    assert table["uid"].to_pylist() == ["10", "11", "13", "14"]
    assert table["place"].to_pylist() == [0, 1, 3, 4]
    opened = create_model(TINY, seed=3).eval()
    tar = verified.folder / read_verdicts(verified.folder)[1].path
    stored = {one["__key__"]: one for one in webdataset.WebDataset(str(tar), shardshuffle=False)}
    picture = Image.open(io.BytesIO(stored["13"]["png"]))
    with torch.inference_mode():
        image = opened.encode_image(image_transform(opened)(picture)[None])[0]
        text = opened.encode_text(tokenize([CAPTIONS[3]]))[0]
    image, text = image / image.norm(), text / text.norm()
    np.testing.assert_allclose(table["image"][2].as_py(), image.numpy(), atol=1e-3)
    np.testing.assert_allclose(table["text"][2].as_py(), text.numpy(), atol=1e-3)
    assert table["similarity"][2].as_py() == pytest.approx(float(image @ text), abs=1e-5)
    every, parts = read_scores([(None, verified.folder), (tmp_path, verified.folder)])
    assert np.isnan(every[:10]).all() and parts.tolist() == [0] * 10 + [1] * 10
    scores = every[10:]
    assert np.isnan(scores).tolist() == [False] * 7 + [True] + [False] * 2
    assert scores[8] == table["similarity"][2].as_py()
    said = json.loads((tmp_path / "report.json").read_text())["sources"]["s"]
    assert sum(said["histogram"]) == said["samples"] == 9


def test_ranks_and_kills_change_no_byte(verified, model, tmp_path):
    embed(verified, model, tmp_path / "one")
    job = EmbedJob(
        model=str(model),
        precision="fp32",
        device="cpu",
        data=verified.folder,
        folder=tmp_path / "two" / FEATURES,
        files=(0, 1),
        workers=1,
    )
    (tmp_path / "two" / FEATURES).mkdir(parents=True)
    embed_share(job, 1, 2)  # the other rank was killed
    write_atomically(tmp_path / "two" / FEATURES / ".000000.parquet.torn", "half")
    embed(verified, model, tmp_path / "two", ranks=2)
    for number in range(2):
        name = f"{FEATURES}/{number:06d}.parquet"
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_model_that_is_not_there_is_one_sentence(verified, tmp_path):
    with pytest.raises(InputError, match="is not a saved model"):
        embed(verified, tmp_path / "nothing", tmp_path / "out")


def test_a_search_finds_what_is_nearest_and_equal_ones_by_place(verified, model, tmp_path):
    embed(verified, model, tmp_path)
    like = read_feature(tmp_path, 1, 3)
    among = Searched(tmp_path, {0: "s", 1: "t"})
    hits = search_features([among], like / np.linalg.norm(like), Wanted(3))
    assert [hits[0].shard, hits[0].place] == [1, 3]
    assert hits[0].likeness == pytest.approx(1, abs=1e-3)
    features = {
        uid: np.array(vector, dtype=np.float32)
        for number in range(2)
        for uid, vector in zip(
            *pq.read_table(tmp_path / FEATURES / f"{number:06d}.parquet")
            .select(["uid", "image"])
            .to_pydict()
            .values(),
            strict=True,
        )
    }
    by_hand = sorted(features, key=lambda uid: (-float(features[uid] @ like), uid))
    assert [f"{hit.shard}{hit.place}" for hit in hits] == by_hand[:3]
    assert len(search_features([among, among], like, Wanted(30))) == 18
    assert {hit.shard for hit in search_features([among], like, Wanted(30, "t"))} == {1}
    middle = sorted(hit.score for hit in search_features([among], like, Wanted(30)))[4]
    better = search_features([among], like, Wanted(30, min_score=middle))
    assert len(better) == 5 and min(hit.score for hit in better) == middle
    assert read_feature(tmp_path, 1, 2) is None and read_feature(tmp_path, 7, 0) is None
