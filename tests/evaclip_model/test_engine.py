"""One optimizer step means the same in one process and under ZeRO on any number of ranks."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evaclip_model.training.config import TrainConfig
from evaclip_model.training.engine import deepspeed_config

WORKER = Path(__file__).with_name("step_worker.py")


@pytest.fixture
def ten_steps(ranks, tmp_path):
    def run(engine, count=1, **options):
        out = tmp_path / f"{engine}-{count}-{len(list(tmp_path.iterdir()))}.safetensors"
        ranks.run(count, tmp_path, WORKER, out, engine, json.dumps(options))
        return load_file(out)

    return run


def difference(ours, theirs):
    """Largest relative difference of any parameter."""
    return max(
        ((ours[name] - value).abs().max() / value.abs().max()).item()
        for name, value in theirs.items()
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"adapt_no_decay": True, "trust_clip": None}, {"zero_stage": 2}, {"optimizer": "adamw"}],
    ids=["lamb", "unclipped lamb on all", "zero 2", "adamw"],
)
def test_sharded_steps_equal_plain_ones_at_1_2_and_3_ranks(ten_steps, options):
    plain = ten_steps("torch", **options)
    for count in (1, 2, 3):  # three cut through the middle of parameters
        assert difference(ten_steps("deepspeed", count, **options), plain) < 2e-5


def test_one_trust_ratio_a_partition_would_fail_that_test(ten_steps):
    plain = ten_steps("torch")
    two = ten_steps("deepspeed", 2, trust_scope="partition")
    three = ten_steps("deepspeed", 3, trust_scope="partition")
    assert difference(two, plain) > 1e-2
    assert difference(three, two) > 1e-2


def test_the_logit_scale_is_bounded_where_it_is_stepped(ten_steps):
    ended = ten_steps("deepspeed", 2)
    assert ended["master"].item() == pytest.approx(math.log(100))
    assert torch.equal(ended["master"], ended["logit_scale"])


def test_low_precision_changes_the_weights_type_not_the_masters(ten_steps):
    plain = ten_steps("torch")
    low = ten_steps("deepspeed", 2, precision="bf16")
    assert low["logit_scale"].dtype == torch.bfloat16
    assert low["master"].dtype == torch.float32
    assert plain["master"].item() == pytest.approx(low["master"].item(), abs=0.1)


def test_micro_batches_share_the_global_batch_out():
    config = TrainConfig(name="x", image_px=4, samples_seen=96, global_batch=96)
    settings = deepspeed_config(config, ranks=3, parameters=1000)
    assert settings["train_batch_size"] == 96
    assert settings["train_micro_batch_size_per_gpu"] == 32
    assert settings["zero_optimization"]["round_robin_gradients"] is False
