"""The settings and the memory of training's objectives; tests/test_guides.py adds another one."""

import io
import json
import math
import shutil
import tarfile
from contextlib import closing

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from evaclip_model.create import interpolate_weights, open_model
from evaclip_model.errors import InputError
from evaclip_model.reading.reader import BatchReader, ReadSettings
from evaclip_model.reading.samples import Shard, ShardManifest
from evaclip_model.training.config import TrainConfig, TrainJob
from evaclip_model.training.loss.objective import make_objective
from evaclip_model.training.trainer import run_training
from evaclip_model.training.training_step import number_batch
from evaclip_model.weights.export import export_model
from tests.evaclip_model.conftest import write_shard
from tests.evaclip_model.trainer_runs import job_of


def test_an_unknown_objective_is_refused_with_those_there_are():
    with pytest.raises(
        InputError, match="objective 'sigmoyd' is unknown: choose one of softmax, sigmoid"
    ):
        TrainConfig.from_mapping(
            {
                **{"name": "x", "image_px": 16, "samples_seen": 32},
                **{"global_batch": 16, "objective": "sigmoyd"},
            },
            where="mine.toml",
        )


def test_the_softmax_objective_is_the_default_and_no_part_of_older_identities():
    config = TrainConfig(name="x", image_px=16, samples_seen=32, global_batch=16)
    assert "objective" not in config.compute_identity()
    assert make_objective(config).bounds == {"logit_scale": (0.0, math.log(100))}
    objective = make_objective(config)
    assert objective.gpu_bytes(10, 20) < objective.gpu_bytes(10_000, 20_000) == 2**28
    assert objective.gpu_bytes(20_000, 40_000) == 2**28


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss_impl": "full"}, "'loss_impl' is no longer a setting: the loss is streamed always"),
        ({"objective": "sigmoid", "label_smoothing": 0.1}, "label_smoothing is of objective 'soft"),
        ({"same_caption": "right"}, "'same_caption' should be 'negative', 'positive' or 'ignore'"),
    ],
)
def test_what_makes_no_objective_is_refused_in_a_sentence(settings, said):
    plain = {"name": "x", "image_px": 16, "samples_seen": 32, "global_batch": 16}
    with pytest.raises(InputError, match=said):
        TrainConfig.from_mapping(plain | settings, where="mine.toml")


def trained(data, run, **settings):
    """What a tiny stage ends with: the folder of its model, and its lines of metrics."""
    settings = {"samples_seen": 3 * 24, "warmup_steps": 0, **settings}
    job = json.loads(job_of(data, run, engine="torch", **settings).read_text())
    run_training(TrainJob.from_mapping(job, where="train.json"), should_stop=lambda: False)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return run / "model", [json.loads(line) for line in lines]


def test_a_sigmoid_models_bias_is_trained_saved_opened_and_exported(tiny_data, tmp_path):
    folder, rows = trained(
        tiny_data, tmp_path / "run", objective="sigmoid", same_caption="positive"
    )
    assert rows[0]["logit_bias"] == -10.0 != rows[-1]["logit_bias"]
    model = open_model(folder)
    assert model.logit_bias is not None and model.logit_bias.item() != -10.0
    cosines = torch.tensor([[0.9, -0.2], [0.1, 0.0]])
    expected = (cosines * model.logit_scale.exp() + model.logit_bias).sigmoid()
    torch.testing.assert_close(model.compute_probabilities(cosines), expected)
    assert _open_clip_like_bias(model, tmp_path) == model.logit_bias.item()
    between = interpolate_weights(tiny_data / "start", folder, 0.5)
    assert between.logit_bias is not None and between.logit_bias.item() == model.logit_bias.item()
    lora = {"rank": 2, "alpha": 4, "on": ["q_proj"]}
    low, _ = trained(tiny_data, tmp_path / "low", objective="sigmoid", lora=lora, optimizer="adamw")
    assert open_model(low).logit_bias.item() != -10.0
    (tmp_path / "again").mkdir()
    shutil.copytree(folder, tmp_path / "again" / "start")
    (tmp_path / "again" / "shards.json").symlink_to(tiny_data / "shards.json")
    for tar in tiny_data.glob("*.tar"):
        (tmp_path / "again" / tar.name).symlink_to(tar)
    plain, _ = trained(tmp_path / "again", tmp_path / "softmax")
    assert open_model(plain).logit_bias is None


def _open_clip_like_bias(model, folder):
    (path,) = export_model(model, folder / "weights.safetensors", as_="open_clip")
    bias = load_file(path)["logit_bias"]
    assert bias.shape == ()
    return float(bias)


@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
def test_equal_captions_are_what_the_recipe_says(tiny_data, tmp_path, objective):
    losses = {
        same: trained(
            tiny_data,
            tmp_path / same,
            objective=objective,
            same_caption=same,
            caption_separator=" ",
            caption_templates=["{}", "one {}"],
        )[1][0]["loss"]
        for same in ("negative", "positive", "ignore")
    }
    assert len({round(loss, 6) for loss in losses.values()}) == 3
    assert losses["ignore"] < losses["negative"]


def test_equal_images_belong_together_whatever_their_captions(tmp_path):
    """As stored: what a recipe keeps of copies, and what a small source shows twice in a batch."""
    rng = np.random.default_rng(0)
    write_shard(tmp_path / "a.tar", "a", ["0", "1", "2", "3"], rng)
    with tarfile.open(tmp_path / "a.tar") as tar:
        held = {one.name: tar.extractfile(one).read() for one in tar.getmembers()}
    held["3.png"] = held["0.png"]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in held.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    size = (tmp_path / "a.tar").stat().st_size
    shard = Shard(path="a.tar", source="a", samples=4, bytes=size, sha256="0" * 64)
    ShardManifest(shards=(shard,)).write(tmp_path / "shards.json")
    given = {"name": "x", "image_px": 16, "samples_seen": 4, "global_batch": 4, "lanes": 2}
    config = TrainConfig(**given, same_caption="positive")
    numbers = []
    for workers in (0, 2):
        settings = ReadSettings(workers=workers)
        reader = BatchReader(tmp_path / "shards.json", config, rank=0, ranks=1, settings=settings)
        with closing(reader), closing(reader.iterate_batches(0, 1)) as batches:
            batch = next(batches)
        numbers.append(number_batch(batch, config))
        places = [int(origin.key) for origin in batch.origins]
    assert torch.equal(*numbers)
    texts, images = numbers[0][np.argsort(places)].T.tolist()
    assert len(set(texts)) == 4 and images[0] == images[3] and len(set(images)) == 3
    assert number_batch(batch, TrainConfig(**given)) is None
