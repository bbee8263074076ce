"""What a rank is told, and what of it decides the artifact's address."""

import json
from pathlib import Path

import pytest

from evaclip_model.errors import InputError
from evaclip_model.reading.samples import ShardManifest
from evaclip_model.training.config import TrainConfig
from tasks.artifacts.artifact import Address
from tasks.train.config import STAGE
from tests.tasks.train.stage import config, train, try_out


def test_settings_that_change_no_result_change_no_address():
    first = Address.of(Path("/runs"), STAGE, config())
    how = {"zero_stage": 0, "checkpoints": {"keep": 9}}
    assert Address.of(Path("/runs"), STAGE, config(**how)).digest == first.digest
    assert Address.of(Path("/runs"), STAGE, config(lr_vision=1e-5)).digest != first.digest


def test_epochs_are_counted_in_the_data_and_scale_what_is_longer():
    stage = config(samples_seen=0, epochs=2.5, warmup_steps=50, checkpoint_every_steps=500)
    fitted = stage.fit_to_data({"a": 100, "b": 20})
    assert (fitted.samples_seen, fitted.steps, fitted.epochs) == (300, 25, None)
    assert (fitted.warmup_steps, fitted.checkpoint_every_steps) == (2, 25)
    weighted = stage.model_copy(update={"source_weights": {"b": 1.0}})
    assert weighted.fit_to_data({"a": 100, "b": 20}).samples_seen == 50
    assert config().fit_to_data({"a": 5}) == config()
    with pytest.raises(InputError, match="'samples_seen' is missing: give it above 0, or 'epochs'"):
        TrainConfig.from_mapping({"name": "x", "image_px": 8, "global_batch": 16}, where="x.toml")


def test_a_stage_in_epochs_has_an_address_before_its_data(data, tmp_path):
    first, second = (
        Address.of(Path("/runs"), STAGE, config(epochs=epochs)).digest for epochs in (1.0, 2.0)
    )
    assert first != second
    (tmp_path / "run").mkdir()
    train(data, tmp_path / "run", {"ranks": 1, "train_engine": "torch"}, epochs=0.5)
    job = json.loads((tmp_path / "run" / "train.json").read_text())["train"]
    samples = ShardManifest.read(data / "shards.json").samples
    assert (job["samples_seen"], job["epochs"]) == (samples // 2, None)


def test_a_try_out_takes_what_the_launch_says_and_leaves_no_weights(data, tmp_path):
    launch = {"ranks": 1, "train_engine": "torch", "micro_batch": 4, "watchdog_s": 60}
    launch |= {"read_workers": 0, "checkpoint_url": f"{tmp_path}/elsewhere/"}
    found = try_out(data, tmp_path / "run", launch)
    assert (found["ranks"], found["micro_batch"]) == (1, 4)
    assert found["loss"] > 0 and found["grad_norm"] > 0
    job = json.loads((tmp_path / "run" / "train.json").read_text())
    told = {name: job[name] for name in ("engine", "micro_batch", "watchdog_s", "checkpoints")}
    assert told == {
        "engine": "torch",
        "micro_batch": 4,
        "watchdog_s": 60.0,
        "checkpoints": f"{tmp_path}/elsewhere/run",
    }
    assert not (tmp_path / "run" / "model").exists()
    assert not list(tmp_path.glob("elsewhere/run/step-*"))
