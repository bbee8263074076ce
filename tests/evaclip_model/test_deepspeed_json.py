"""DeepSpeed is told what the settings say, without being imported."""

import json
import subprocess
import sys

import pytest

from evaclip_model.training.config import TrainConfig
from evaclip_model.training.engine.deepspeed_config import deepspeed_config


def settings(**changes):
    given = {"name": "x", "image_px": 4, "samples_seen": 96, "global_batch": 96}
    return TrainConfig(**{**given, **changes})


def test_a_ranks_share_of_the_global_batch_is_one_micro_batch():
    made = deepspeed_config(settings(), ranks=3, parameters=1000)
    assert made["train_batch_size"] == 96
    assert made["train_micro_batch_size_per_gpu"] == 32
    assert made["gradient_accumulation_steps"] == 1
    assert json.loads(json.dumps(made)) == made


def test_nothing_that_moves_parameters_away_from_the_map_is_asked_for():
    zero = deepspeed_config(settings(), ranks=1, parameters=1000)["zero_optimization"]
    assert zero["round_robin_gradients"] is False
    assert zero["parameter_alignment"] is False


def test_fp16_scales_the_loss_as_the_paper_does():
    made = deepspeed_config(settings(precision="fp16"), ranks=1, parameters=1000)
    assert made["fp16"] == {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 16,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "min_loss_scale": 1,
    }
    assert made["gradient_clipping"] == 5.0
    assert made["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize(
    ("changes", "in_fp32"),
    [
        ({"precision": "fp32"}, False),
        ({"precision": "bf16"}, True),
        ({"precision": "fp16", "zero_stage": 2}, True),
        ({"precision": "bf16", "zero_stage": 0}, False),
    ],
    ids=str,
)
def test_a_gradient_that_comes_in_parts_is_added_up_in_fp32(changes, in_fp32):
    whole = deepspeed_config(settings(**changes), 1, 1000)
    parts = deepspeed_config(settings(**changes), 1, 1000, accumulates=True)
    assert "data_types" not in whole
    assert parts.get("data_types") == ({"grad_accum_dtype": "fp32"} if in_fp32 else None)


def test_making_it_needs_neither_torch_nor_deepspeed():
    code = (
        "import sys, evaclip_model.training.engine.deepspeed_config\n"
        "assert not {'torch', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_clipping_that_is_off_is_said_so_to_deepspeed_whose_default_is_one():
    made = deepspeed_config(settings(grad_clip_norm=None), ranks=1, parameters=1000)
    assert made["gradient_clipping"] == 0.0
