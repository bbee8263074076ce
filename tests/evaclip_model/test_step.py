"""A step's gradient is the same however many parts and ranks a batch is worked on in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from evaclip_model.training.config import TrainConfig
from evaclip_model.training.loss.objective import Objective, make_objective
from evaclip_model.training.training_step import ModelInputs, forward_backward, step_inputs
from tests.evaclip_model.plain_loss import TEACHER, teachers_of
from tests.evaclip_model.small_models import small_batch, small_model

WORKER = Path(__file__).with_name("accumulation_worker.py")
SAMPLES = 12
CONFIG = TrainConfig(
    name="x",
    image_px=32,
    samples_seen=120,
    global_batch=SAMPLES,
    lanes=6,
    drop_path=0.4,
    label_smoothing=0.1,
)


def batch(config: TrainConfig = CONFIG, step: int = 3) -> ModelInputs:
    _, tokens, _ = small_batch(SAMPLES)
    draw = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (SAMPLES, 3, 32, 32), dtype=torch.uint8, generator=draw)
    vision = small_model().config.vision
    positions = torch.arange(SAMPLES) + step * SAMPLES
    return step_inputs(config, vision, step, images, tokens, positions)


class Plain:
    """What a step needs of an engine, without masters: gradients stay with the parameters."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.module = model
        self.completed = 0

    def backward(self, loss: Tensor, *, last: bool) -> None:
        assert not self.completed
        loss.backward()
        self.completed += last


def gradients(micro_batch: int | None, precision: str = "fp64", **settings: Any):
    """Terms of a step, and the gradient of every parameter by its name."""
    model = small_model(precision=precision).train()
    model.set_drop_path(CONFIG.drop_path)
    if settings.get("objective") == "sigmoid":
        model.logit_bias = torch.nn.Parameter(torch.full_like(model.logit_scale, -10))
    engine = Plain(model)
    teachers = teachers_of(SAMPLES, [5, 9]) if "teacher" in settings else ()
    terms = forward_backward(
        engine, batch().split_parts(micro_batch), objective(**settings), teachers=teachers
    )
    assert engine.completed == 1
    return terms, {name: p.grad for name, p in model.named_parameters()}


def objective(**settings: Any) -> Objective:
    return make_objective(CONFIG.model_copy(update=settings))


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest difference of any tensor, as a share of its largest element."""
    return max(
        float((ours[name].double() - value.double()).abs().max() / value.double().abs().max())
        for name, value in theirs.items()
    )


@pytest.mark.parametrize("settings", [{}, {"objective": "sigmoid"}, {"teacher": TEACHER}], ids=str)
@pytest.mark.parametrize("micro_batch", [6, 4, 3, 1])
def test_parts_give_the_gradient_of_the_whole_to_double_precision(micro_batch, settings):
    whole, expected = gradients(None, **settings)
    parts, found = gradients(micro_batch, **settings)
    assert difference(found, expected) < 1e-9
    assert float(parts.scalars["logit_scale"]) == float(whole.scalars["logit_scale"])
    for name in ("loss", "image_to_text_accuracy", "text_to_image_accuracy"):
        assert float(getattr(parts, name)) == pytest.approx(float(getattr(whole, name)), rel=1e-12)


def test_the_temperatures_gradient_comes_once():
    """By finite differences, the features being the same."""
    _, found = gradients(4)
    losses = []
    for change in (1e-5, -1e-5):
        model = small_model(precision="fp64").train()
        model.set_drop_path(CONFIG.drop_path)
        model.logit_scale.data.add_(change)
        terms = forward_backward(Plain(model), batch().split_parts(4), objective())
        losses.append(float(terms.loss))
    assert float(found["logit_scale"]) == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.06), ("fp16", 0.01)])
def test_low_precision_features_are_contrasted_in_fp32(precision, tolerance):
    whole, expected = gradients(None, precision)
    parts, found = gradients(4, precision)
    assert whole.loss.dtype == parts.loss.dtype == torch.float32
    assert float(parts.loss) == pytest.approx(float(whole.loss), rel=1e-3)
    assert found["visual.head.weight"].dtype != torch.float32
    matrices = {name: value for name, value in expected.items() if value.dim() > 1}
    assert difference(found, matrices) < tolerance  # parts are added up in the weights' precision


def test_masks_and_branches_go_with_their_samples():
    inputs = batch()
    assert inputs.kept is not None and inputs.branches is not None
    parts = inputs.split_parts(5)
    assert [len(part) for part in parts] == [5, 5, 2]
    for field in ("images", "tokens", "kept", "branches"):
        assert torch.equal(torch.cat([getattr(p, field) for p in parts]), getattr(inputs, field))
    plain = CONFIG.model_copy(update={"patch_dropout": 0.0, "drop_path": 0.0})
    whole = batch(plain)
    assert whole.kept is None and whole.branches is None and len(whole.split_parts(None)) == 1
    late = CONFIG.model_copy(update={"unmasked_final_share": 0.5})
    assert batch(late, step=4).kept is not None
    assert batch(late, step=5).kept is None


def test_a_sample_whose_features_are_no_numbers_is_named():
    model = small_model().train()
    inputs = batch()
    with torch.no_grad():
        model.text.token_embedding.weight[int(inputs.tokens[7, 1])] = torch.nan
    others = [i for i in range(SAMPLES) if int(inputs.tokens[7, 1]) not in inputs.tokens[i]]
    for micro_batch in (None, 5):
        terms = forward_backward(Plain(model), inputs.split_parts(micro_batch), objective())
        assert not bool(terms.finite_rows[7])
        assert terms.finite_rows[others].all() and len(others) > 6


@pytest.mark.parametrize(("count", "parts"), [(1, 4), (2, 2), (3, 1)])
def test_twenty_steps_on_any_ranks_and_parts_train_the_same_model(
    plain, ranks, tmp_path, count, parts
):
    compare(plain, ranks, tmp_path, count, [parts], {})


def test_so_they_do_with_the_sigmoid_loss_and_a_teacher(plain, ranks, tmp_path):
    teacher = {"models": ["one", "another"], "weight": 0.3}
    settings = {"objective": "sigmoid", "teacher": teacher, "lr_vision": 2e-3, "lr_text": 2e-3}
    compare(plain, ranks, tmp_path, 2, [2], settings)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "adamw", "lr_vision": 2e-3, "lr_text": 2e-3},
        {"zero_stage": 2},
        {"label_smoothing": 0.1},
        {"same_caption": "positive"},
        {"grad_checkpointing": "full"},
        {"patch_dropout": 0.8, "patch_dropout_end": 0.2, "unmasked_final_share": 0.25},
    ],
    ids=lambda options: ", ".join(f"{key} {value}" for key, value in options.items()) or "the same",
)
def test_so_they_do_in_every_combination(plain, ranks, tmp_path, count, options):
    compare(plain, ranks, tmp_path, count, [1, 2, 4], options)


def compare(plain, ranks, folder, count, parts, options) -> None:
    """20 DeepSpeed steps on `count` ranks, in each number of parts, against plain torch's."""
    expected = plain(options)
    ranks.run(count, folder, WORKER, "deepspeed", json.dumps(options), parts, folder)
    for number in parts:
        found = load_file(folder / f"{number}.safetensors")
        torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-6, atol=0)
        assert difference(without_key_biases(found), without_key_biases(expected)) < 5e-4


def without_key_biases(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Attention does not depend on them: their gradient is rounding, which Adam makes large."""
    return {
        name: torch.cat((value.chunk(3)[0], value.chunk(3)[2])) if "in_proj_bias" in name else value
        for name, value in weights.items()
    }


@pytest.fixture(scope="module")
def plain(ranks, tmp_path_factory):
    """Losses and weights of plain torch in one process, by settings."""
    made: dict[str, dict[str, Tensor]] = {}

    def run(options):
        key = json.dumps(options)
        if key not in made:
            folder = tmp_path_factory.mktemp("plain")
            ranks.run(1, folder, WORKER, "torch", key, [1], folder)
            made[key] = load_file(folder / "1.safetensors")
        return made[key]

    return run
