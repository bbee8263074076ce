"""One optimizer step means the same in one process and under ZeRO on any number of ranks."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from evaclip_model.errors import InputError
from evaclip_model.training.config import TrainConfig
from evaclip_model.training.engine.engine import TorchEngine

HERE = Path(__file__).parent
GENTLE = {"lr_vision": 0.003, "lr_text": 0.003, "lr_other": 0.003}
"""Rates at which low precision does not send ten steps elsewhere."""


@pytest.fixture(scope="module")
def steps(ranks, tmp_path_factory):
    """Run step_worker.py on real ranks; equal runs are run once."""
    known = {}

    def run(engine, count=1, **options):
        key = json.dumps([engine, count, options])
        if key not in known:
            folder = tmp_path_factory.mktemp("steps")
            out = folder / "out.safetensors"
            script = [HERE / "step_worker.py"]
            if options.get("precision") == "fp16":
                script.insert(0, HERE / "fp16_on_cpu.py")
            ranks.run(count, folder, *script, out, engine, json.dumps(options))
            known[key] = load_file(out)
        return known[key]

    return run


def difference(ours, theirs):
    """Largest of any master: norm of the difference over norm of the value."""
    return max(
        ((ours[name] - value).norm() / value.norm()).item()
        for name, value in theirs.items()
        if name.startswith("param.")
    )


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({}, (1, 2, 3, 5)),
        ({"lamb": {"adapt_no_decay": True, "trust_clip": None}}, (2, 3)),
        ({"zero_stage": 2, "parts": 3}, (1, 2, 5)),
        ({"zero_stage": 0, "parts": 3}, (2, 5)),
        ({"optimizer": "adamw"}, (2, 3)),
    ],
    ids=["lamb", "unclipped lamb on all", "zero 2 in parts", "zero 0 in parts", "adamw"],
)
def test_sharded_steps_equal_plain_ones_at_any_number_of_ranks(steps, options, counts):
    plain = steps("torch", **{**options, "zero_stage": 1, "parts": 1})
    for count in counts:  # three and five cut through the middle of parameters
        sharded = steps("deepspeed", count, **options)
        assert difference(sharded, plain) < 2e-5
        torch.testing.assert_close(sharded["losses"], plain["losses"], rtol=1e-6, atol=0)


def test_naive_lamb_fails_that_test(steps):
    plain = steps("torch")
    naive = {
        count: steps("deepspeed", count, lamb={"trust_scope": "partition"}) for count in (1, 2, 3)
    }
    for run in naive.values():
        assert difference(run, plain) > 1e-2
    assert difference(naive[3], naive[2]) > 1e-2  # what it gives depends on the number of ranks


@pytest.mark.parametrize(
    ("precision", "near"), [("bf16", 3e-2), ("fp16", 5e-3)], ids=["bf16", "fp16"]
)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_low_precision_stays_near_at_every_stage_whole_and_in_parts(steps, precision, near, stage):
    plain = steps("torch", **GENTLE)
    for count, parts in ((1, 1), (2, 3)):
        options = {"precision": precision, "zero_stage": stage, "parts": parts}
        low = steps("deepspeed", count, **GENTLE, **options)
        assert difference(low, plain) < near
        torch.testing.assert_close(low["norms"], plain["norms"], rtol=1e-2, atol=0)
        assert low["logit_scale"].dtype != low["param.logit_scale"].dtype == torch.float32


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_three_and_five_ranks_in_bf16_and_plain_torch_stay_near_too(steps, precision):
    plain = steps("torch", **GENTLE)
    for engine, count in (("deepspeed", 3), ("deepspeed", 5), ("torch", 1)):
        parts = 2 if engine == "torch" else 1
        low = steps(engine, count, precision=precision, parts=parts, **GENTLE)
        assert difference(low, plain) < (3e-2 if precision == "bf16" else 2e-5)


def test_gradient_norms_are_those_of_the_towers_and_tell_of_clipping(steps):
    plain, two = steps("torch"), steps("deepspeed", 2, zero_stage=2)
    torch.testing.assert_close(two["norms"], plain["norms"], rtol=1e-5, atol=0)
    total, *towers = plain["norms"].T
    torch.testing.assert_close(total, torch.stack(towers).square().sum(0).sqrt())
    assert all((tower > 0).any() for tower in towers)
    assert torch.equal(plain["clipped"].bool(), total > 0.5)
    least, middle, most = two["trust"].T
    assert (least > 0).all()
    assert (least < middle).all()
    assert (middle < most).all()
    torch.testing.assert_close(two["trust"], plain["trust"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("engine", "count", "options"),
    [
        ("torch", 1, {"precision": "bf16", "parts": 2}),
        ("deepspeed", 2, {"zero_stage": 0, "precision": "bf16", "parts": 2}),
        ("deepspeed", 2, {"zero_stage": 1, "parts": 2}),
        ("deepspeed", 2, {"zero_stage": 1, "precision": "bf16", "parts": 2}),
        ("deepspeed", 2, {"zero_stage": 2, "precision": "fp16", "parts": 2}),
    ],
    ids=str,
)
def test_neither_a_gradient_thrown_away_nor_a_restored_state_changes_a_bit(
    steps, engine, count, options
):
    undisturbed = steps(engine, count, ema_decay=0.9, **options)
    disturbed = steps(engine, count, ema_decay=0.9, **options, thrown_away=[0, 3, 4], stop_after=5)
    for name, value in undisturbed.items():
        assert torch.equal(disturbed[name], value), name


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_overflow_of_one_rank_lowers_the_loss_scale_of_all(steps, stage):
    run = steps("deepspeed", 2, precision="fp16", zero_stage=stage, overflow=[2, 3, 4])
    assert run["skipped"].nonzero().flatten().tolist() == [2, 3, 4]
    lowered = 3 if stage == 0 else 2  # stage 0 has no hysteresis in DeepSpeed
    assert (
        run["scales"].tolist()
        == [2.0**16] * 3 + run["scales"][3:5].tolist() + [2.0 ** (16 - lowered)] * 5
    )
    assert run["norms"][:, 0].isfinite().tolist() == [step not in (2, 3, 4) for step in range(10)]


@pytest.mark.parametrize("stage", [0, 1])
def test_overflow_at_the_lowest_loss_scale_is_an_error(steps, stage):
    run = steps(
        "deepspeed", 2, precision="fp16", zero_stage=stage, steps=20, overflow=list(range(20))
    )
    assert run["exhausted"].item() == 16 + (stage > 0)
    assert run["scales"][-1].item() == 2


@pytest.mark.parametrize(
    ("engine", "options"),
    [("torch", {}), ("deepspeed", {}), ("deepspeed", {"precision": "bf16", "zero_stage": 2})],
    ids=str,
)
def test_a_gradient_that_is_no_number_changes_nothing(steps, engine, options):
    count = 2 if engine == "deepspeed" else 1
    one = steps(engine, count, **options, steps=1)
    then_bad = steps(engine, count, **options, steps=1 + 2, overflow=[1, 2])
    assert then_bad["skipped"].tolist() == [0, 1, 1]
    for name, value in one.items():
        if name.startswith("param."):
            assert torch.equal(then_bad[name], value)


def test_the_logit_scale_is_bounded_where_it_is_stepped(steps):
    for stage in (0, 1):
        ended = steps("deepspeed", 2, zero_stage=stage)
        assert ended["param.logit_scale"].item() == pytest.approx(math.log(100))
        assert torch.equal(ended["param.logit_scale"], ended["logit_scale"])


def test_what_is_frozen_keeps_its_weights_and_the_rest_trains(steps):
    start = steps("torch", lr_vision=0.0, lr_text=0.0, lr_other=0.0, steps=1)
    options = {"freeze": ["vision", "logit_scale"], "ema_decay": 0.5}
    for run in (steps("torch", **options), steps("deepspeed", 2, **options)):
        for name, value in start.items():
            if name.startswith("param."):
                assert torch.equal(run[name], value) == ("text." not in name)
                assert torch.equal(run[name.replace("param", "ema")], value) == (
                    "text." not in name
                )
        assert (run["norms"][:, 1] == 0).all()


@pytest.mark.parametrize("stage", [None, 0, 1, 2])
def test_masters_begin_at_the_exact_weights_not_at_rounded_ones(steps, stage):
    still = {"lr_vision": 0.0, "lr_text": 0.0, "lr_other": 0.0, "steps": 1}
    start = steps("torch", **still)
    engine, count = ("torch", 1) if stage is None else ("deepspeed", 2)
    options = {} if stage is None else {"zero_stage": stage}
    low = steps(engine, count, precision="bf16", ema_decay=0.5, **options, **still)
    for name, value in start.items():
        if name.startswith("param."):
            assert torch.equal(low[name], value)
            assert torch.equal(low[name.replace("param", "ema")], value)
            assert torch.equal(low[name.removeprefix("param.")], value.bfloat16())


def test_the_running_mean_is_that_of_the_masters(steps):
    masters = [steps("torch", steps=count)["param.text.proj.weight"] for count in (1, 2, 3)]
    start = steps("torch", steps=1, lr_text=0.0)["param.text.proj.weight"]
    expected = start
    for master in masters:
        expected = 0.9 * expected + 0.1 * master
    for run in (
        steps("torch", steps=3, ema_decay=0.9),
        steps("deepspeed", 3, steps=3, ema_decay=0.9),
    ):
        torch.testing.assert_close(run["ema.text.proj.weight"], expected, rtol=1e-5, atol=1e-6)


def settings(**changes):
    given = {"name": "x", "image_px": 4, "samples_seen": 96, "global_batch": 96}
    return TrainConfig(**{**given, **changes})


def test_plain_torch_has_no_fp16():
    with pytest.raises(InputError, match="bf16 or fp32"):
        TorchEngine(nn.Linear(2, 2), settings(precision="fp16"))


def test_a_model_without_anything_to_train_is_refused():
    model = nn.Module()
    model.visual = nn.Linear(2, 2)
    with pytest.raises(InputError, match="leaves nothing to train"):
        TorchEngine(model, settings(freeze=("vision",)))
    with pytest.raises(ValueError, match="freeze leaves nothing to train"):
        settings(freeze=("vision", "text", "logit_scale"))


def test_plain_torch_trains_without_importing_deepspeed(tmp_path):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['x', '{tmp_path / 'out'}', 'torch', '{{\"precision\": \"bf16\"}}']\n"
        f"runpy.run_path('{HERE / 'step_worker.py'}')\n"
        "import evaclip_model.training.trainer\n"
        "assert not [name for name in sys.modules if name.startswith('deepspeed')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert load_file(tmp_path / "out")["losses"].isfinite().all()
