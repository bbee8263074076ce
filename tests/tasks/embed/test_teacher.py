"""Features of what a training stage shows, and a student that learns from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from evaclip_model.create import create_model, open_model
from evaclip_model.errors import InputError
from evaclip_model.reading import teacher_features
from evaclip_model.training.config import TrainConfig, TrainJob
from evaclip_model.training.trainer import run_training
from evaclip_model.weights.load import save_model
from tasks.embed.config import FEATURES
from tasks.embed.embed import embed_stream
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
    made = embed_stream(train, start, tiny_data, out, report_nothing, 1, "cpu")
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


def test_ranks_and_kills_change_no_byte(tiny_data, taught, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_features, "FILE_SAMPLES", 40)  # so that a step is a file
    train = job(tiny_data, tmp_path / "asked").train
    for ranks in (1, 3):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        share = EmbedJob(
            model=str(tiny_data / "start"),
            precision="fp32",
            device="cpu",
            data=tiny_data,
            stream=train,
            folder=folder,
            files=(0, 1, 2, 3),
            ranks=ranks,
        )
        for rank in reversed(range(ranks)):
            embed_share(share, rank)
    for number in range(4):
        one, three = (
            teacher_features.stream_file(tmp_path / str(ranks), number).read_bytes()
            for ranks in (1, 3)
        )
        assert one == three
    whole = teacher_features.stream_file(taught / FEATURES, 0).read_bytes()
    assert whole.endswith(one[-100:])  # the last step's


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
