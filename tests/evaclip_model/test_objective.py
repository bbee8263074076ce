"""The settings and the memory of training's objectives; tests/test_guides.py adds another one."""

import math

import pytest

from evaclip_model.errors import InputError
from evaclip_model.training.config import TrainConfig
from evaclip_model.training.loss.objective import make_objective


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
