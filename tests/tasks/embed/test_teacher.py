"""Features of what a training stage shows, and a student that learns from them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from evaclip_model.create import create_model, open_model
from evaclip_model.errors import InputError
from evaclip_model.reading import teacher_features
from evaclip_model.training.config import TrainConfig, TrainJob
from evaclip_model.training.trainer import run_training
from evaclip_model.weights.load import save_model
from tasks.embed.config import FEATURES, EmbedConfig
from tasks.embed.embed import embed_samples
from tasks.embed.embed_shard import EmbedJob, embed_share
from tasks.progress import report_nothing
from tests.evaclip_model.conftest import write_small_shards
from tests.evaclip_model.trainer_runs import TINY, job_of

SHOWN = {"caption_separator": " ", "caption_templates": ["{}", "one {}"], "crop_scale": [0.3, 1.0]}
SAMPLES = 4 * 24


def job(data: Path, run: Path, seed: int = 1, **teacher: object) -> TrainJob:
    """A job of four steps whose teacher is the model that it starts from."""
    start = str(data / "start")
    scale = float(open_model(start).logit_scale.detach().exp())
    learnt = {"models": [start], "logit_scale": scale, "weight": 1.0, **teacher}
    path = job_of(
        data,
        run,
        engine="torch",
        samples_seen=SAMPLES,
        seed=seed,
        patch_dropout=0.0,
        lr_other=0.0,
        teacher=learnt,
        job={"teachers": [str(run.parent / "taught" / FEATURES)]},
        **SHOWN,
    )
    return TrainJob.from_mapping(json.loads(path.read_text()), where="train.json")


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_small_shards(tmp_path_factory.mktemp("data"))
    save_model(create_model(TINY, seed=0), folder / "start")
    return folder


@pytest.fixture(scope="module")
def taught(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "taught"
    train = job(tiny_data, out.parent / "asked").train
    start = str(tiny_data / "start")
    by = EmbedConfig(models=(start,))
    made = embed_samples(by, "start", start, tiny_data, out, report_nothing, stream=train)
    assert dict(made.counts) == {"samples": SAMPLES}
    return out


def losses(job: TrainJob) -> list[float]:
    run_training(job, should_stop=lambda: False)
    lines = (job.run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_a_teacher_that_is_the_student_differs_in_nothing_of_what_is_shown(tiny_data, taught):
    same = losses(job(tiny_data, taught.parent / "same"))
    other = losses(job(tiny_data, taught.parent / "other", seed=2))  # crops, captions, order
    assert 0 <= same[0] < 1e-4 < 0.01 < other[0]
    half = losses(job(tiny_data, taught.parent / "half", weight=0.5))
    plain = job(tiny_data, taught.parent / "plain")
    plain = plain.model_copy(
        update={"train": plain.train.model_copy(update={"teacher": None}), "teachers": ()}
    )
    assert half[0] == pytest.approx(losses(plain)[0] / 2, abs=1e-4)


@pytest.mark.parametrize("most", [24, 50, 10])  # a step; two; a third of one, by lanes
def test_ranks_kills_and_files_change_no_byte(tiny_data, taught, tmp_path, monkeypatch, most):
    monkeypatch.setattr(teacher_features, "FILE_SAMPLES", most)
    train = job(tiny_data, tmp_path / "asked").train
    steps, groups = teacher_features.split_stream(train)
    assert (steps, groups) == {24: (1, 1), 50: (2, 1), 10: (1, 3)}[most]
    files = tuple(range(SAMPLES // 24 // steps * groups))
    share = EmbedJob(
        model=str(tiny_data / "start"),
        precision="fp32",
        device="cpu",
        data=tiny_data,
        stream=train,
        folder=tmp_path,
        files=files,
        workers=0,
    )
    embed_share(share, 1, 2)  # the other rank was killed
    missing = [one for one in files if not teacher_features.stream_file(tmp_path, one).exists()]
    assert 0 < len(missing) < len(files)
    for rank in range(3):
        embed_share(share.model_copy(update={"files": tuple(missing)}), rank, 3)
    whole = torch.from_numpy(np.load(teacher_features.stream_file(taught / FEATURES, 0)))
    for positions in torch.arange(SAMPLES).split(12):  # as two ranks read them
        found = teacher_features.read_features(tmp_path, positions, train)
        assert torch.equal(found, whole[positions])


def test_features_that_are_not_there_or_too_few_are_one_sentence(tiny_data, taught, tmp_path):
    with pytest.raises(InputError, match="has no features of this stage's samples"):
        losses(job(tiny_data, tmp_path / "none"))
    longer = job(tiny_data, taught.parent / "longer")
    train = longer.train.model_copy(update={"samples_seen": 5 * 24})
    with pytest.raises(InputError, match="has no features of this stage's samples"):
        losses(longer.model_copy(update={"train": train}))


def test_a_teacher_without_features_and_one_with_rollbacks_are_refused(tiny_data, tmp_path):
    given = job(tiny_data, tmp_path / "run").model_dump(mode="json")
    with pytest.raises(InputError, match="a folder of features for each of"):
        TrainJob.from_mapping({**given, "teachers": []}, where="train.json")
    changes = {**given["train"], "guards": {"spike_action": "rollback"}}
    with pytest.raises(ValidationError, match="teacher excludes guards"):
        TrainConfig(**changes)
