"""An objective is one object: a new one is a file and a line, and the trainer knows no other."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from evaclip_model.errors import InputError
from evaclip_model.training.config import TrainConfig
from evaclip_model.training.loss.objective import make_objective
from tests.evaclip_model.trainer_runs import job_of

PACKAGE = Path(__file__).parents[2] / "evaclip_model"
SIGMOID = '''"""`objective = "sigmoid"`: a pair against all others, each a question of its own."""

import torch
import torch.nn.functional as F

from evaclip_model.training.loss.objective import LossTerms


class SigmoidObjective:
    parameters = {"logit_scale": 2.3, "logit_bias": -3.0}
    bounds = {"logit_scale": (0.0, 4.6), "logit_bias": (-2.99, 0.0)}

    def __init__(self, config):
        pass

    def scalars(self, model):
        scale, bias = model.logit_scale.float().exp(), model.logit_bias.float()
        return {"logit_scale": scale.squeeze(0), "logit_bias": bias.squeeze(0)}

    def terms(self, image, text, scalars, *, is_whole_batch=False):
        logits = scalars["logit_scale"] * image @ text.T + scalars["logit_bias"]
        signs = 2 * torch.eye(len(image)) - 1
        hits = (logits.argmax(1) == torch.arange(len(image))).float().mean()
        return LossTerms(-F.logsigmoid(signs * logits).sum() / len(image), hits, hits)

    def gpu_bytes(self, rows, columns):
        return 4.0 * rows * columns
'''


@pytest.mark.parametrize("parts", [{}, {"micro_batch": 8}])
def test_a_new_loss_is_one_file_and_one_line(tiny_data, tmp_path, parts):
    shutil.copytree(PACKAGE, tmp_path / "evaclip_model")
    loss = tmp_path / "evaclip_model" / "training" / "loss"
    (loss / "sigmoid.py").write_text(SIGMOID)
    registry = loss / "objective.py"
    line = '    "sigmoid": "evaclip_model.training.loss.sigmoid:SigmoidObjective",\n}'
    registry.write_text(registry.read_text().replace("\n}", f"\n{line}", 1))

    settings = {"objective": "sigmoid", "samples_seen": 48, "lr_other": 1e-2, "warmup_steps": 0}
    job = job_of(tiny_data, tmp_path / "run", engine="torch", job=parts, **settings)
    ran = subprocess.run(
        [sys.executable, "-m", "evaclip_model.training.worker", job],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    rows = [json.loads(row) for row in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["loss"] > rows[1]["loss"]
    assert rows[0]["logit_bias"] == -3.0
    assert rows[1]["logit_bias"] == pytest.approx(-2.99)  # the engine keeps what is bounded
    trained = load_file(tmp_path / "run/model/model.safetensors")
    assert trained["logit_bias"].shape == (1,)


def test_an_unknown_objective_is_refused_with_those_there_are():
    with pytest.raises(InputError, match="objective 'sigmoyd' is unknown: choose one of softmax"):
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
    full, streamed = (
        make_objective(config.model_copy(update={"loss_impl": impl}))
        for impl in ("full", "streamed")
    )
    assert full.gpu_bytes(100, 200) == 6 * 4 * 100 * 200
    assert streamed.gpu_bytes(100, 200) == streamed.gpu_bytes(10_000, 20_000)
