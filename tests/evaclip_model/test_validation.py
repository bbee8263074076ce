"""Validation on held-out pairs: what it measures, and that training does not notice it."""

import json
import shutil

import pytest
import torch

from evaclip_model.create import open_model
from evaclip_model.reading.reader import ReadSettings
from evaclip_model.reading.samples import ShardManifest
from evaclip_model.training.config import TrainConfig, TrainJob
from evaclip_model.training.loss.objective import make_objective
from evaclip_model.training.monitoring.validation import read_held_out, validate_model
from evaclip_model.training.trainer import run_training
from tests.evaclip_model.trainer_runs import finish, job_of, start

FIGURES = {"validation_loss"} | {
    f"validation_{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5)
}


@pytest.fixture(scope="module")
def held_out(tiny_data, tmp_path_factory):
    """`tiny_data` with the pairs of the last shard held out."""
    folder = tmp_path_factory.mktemp("held_out") / "data"
    shutil.copytree(tiny_data, folder)
    *shown, held = ShardManifest.read(folder / "shards.json").shards
    ShardManifest(shards=tuple(shown)).write(folder / "shards.json")
    ShardManifest(shards=(held,)).write(folder / "validation.json")
    return folder


def run_alone(data, run, **settings):
    """Lines of metrics of five steps in this process."""
    job = job_of(
        data, run, engine="torch", **{"samples_seen": 5 * 24, "drop_path": 0.2, **settings}
    )
    run_training(
        TrainJob.from_mapping(json.loads(job.read_text()), where="job"), should_stop=lambda: False
    )
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def figures_of(rows):
    return [{name: row[name] for name in FIGURES & row.keys()} for row in rows]


def test_training_goes_on_as_without_validation(held_out, tmp_path):
    plain = run_alone(held_out, tmp_path / "plain")
    watched = run_alone(held_out, tmp_path / "watched", validation={"every_steps": 2})
    assert [row["loss"] for row in watched] == [row["loss"] for row in plain]
    second, last = figures_of(watched)[1], figures_of(watched)[4]
    assert [len(row) for row in figures_of(watched)] == [0, 5, 0, 5, 5]
    assert second["validation_loss"] != last["validation_loss"]
    assert second["validation_image_to_text_r1"] <= second["validation_image_to_text_r5"]


def test_two_ranks_measure_what_one_does(held_out, ranks, tmp_path):
    still = dict.fromkeys(("lr_vision", "lr_text", "lr_other"), 0.0)
    still |= {"samples_seen": 2 * 24, "validation": {"every_steps": 1}}
    job = job_of(held_out, tmp_path / "two", **still)
    two = finish(ranks, start(ranks, 2, job), job)
    alone = run_alone(held_out, tmp_path / "one", **{**still, "samples_seen": 24})
    assert figures_of(two)[0] == figures_of(two)[1] == figures_of(alone)[0]


def test_the_loss_is_the_objectives_over_all_held_out_pairs(held_out):
    config = TrainConfig.from_mapping(
        json.loads(job_of(held_out, held_out / "run").read_text())["train"], where="test"
    )
    model = open_model(held_out / "start").train()
    pairs = read_held_out(held_out / "shards.json", config, ReadSettings())
    assert len(pairs.captions) == len(set(pairs.captions)) == 14
    before = torch.get_rng_state()
    found = validate_model(model, pairs, make_objective(config), config)
    assert found.keys() == FIGURES and 0 < found["validation_loss"] < 10
    assert model.training and torch.equal(before, torch.get_rng_state())
    again = validate_model(model, pairs, make_objective(config), config)
    assert again == found
