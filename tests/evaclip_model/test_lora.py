"""Low-rank updates: they alone train, go on exactly, and are merged when the model is saved."""

import pytest
import torch
from pydantic import ValidationError

from evaclip_model.create import open_model
from evaclip_model.errors import InputError
from evaclip_model.training.checkpoint.save_and_load import (
    load_newest,
    save_checkpoint,
    save_models,
)
from evaclip_model.training.config import TrainConfig
from evaclip_model.training.engine.engine import TorchEngine
from evaclip_model.training.loss.contrastive import contrastive_loss
from evaclip_model.training.trainer import add_updates
from evaclip_model.weights.checkpoint_format import TrainingProgress
from evaclip_model.weights.load import released_tensors, save_model
from tests.evaclip_model.small_models import FAMILIES, small_batch, small_model
from tests.evaclip_model.trainer_runs import finish, job_of, start

ON = ["q_proj", "vision.w3", "in_proj", "c_proj"]


def settings(on=ON, rank=4, **changes):
    given = {"name": "x", "image_px": 32, "samples_seen": 96, "global_batch": 96, "lr_vision": 0.01}
    lora = {"rank": rank, "alpha": 8, "on": on}
    return TrainConfig(**{**given, "optimizer": "adamw", "lora": lora, "lr_text": 0.01, **changes})


def adapted(config, family="EVA-02"):
    model = small_model(family).train()
    add_updates(model, config)
    return model, TorchEngine(model, config)


def take_steps(engine, count=2):
    images, tokens, kept = small_batch()
    for _ in range(count):
        engine.backward(contrastive_loss(*engine.module(images, tokens, kept)), last=True)
        engine.step(1.0)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_a_saved_model_computes_what_the_updates_made_of_it(tmp_path, mode):
    model, engine = adapted(settings())
    model.set_grad_checkpointing(mode)
    take_steps(engine)
    images, tokens, _ = small_batch()
    before = small_model()(images, tokens)
    with torch.no_grad():
        unmerged = model.eval()(images, tokens)
    assert set(released_tensors(model)) == set(small_model().state_dict())
    save_models(tmp_path, tmp_path, model, engine.state_fragments(), 0)
    with torch.no_grad():
        merged = open_model(tmp_path / "model")(images, tokens)
    for ours, theirs, untrained in zip(merged[:2], unmerged[:2], before[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        assert (ours - untrained).abs().max() > 1e-3


def test_what_is_frozen_is_saved_as_it_was_not_as_bf16_has_it(tmp_path):
    save_model(small_model(), tmp_path / "start")
    model, engine = adapted(settings(precision="bf16", on=["c_proj"]))
    take_steps(engine)
    save_models(tmp_path, tmp_path / "start", model, engine.state_fragments(), 0)
    made, given = open_model(tmp_path / "model").state_dict(), small_model().state_dict()
    for name, value in made.items():
        assert torch.equal(value, given[name]) == (".c_proj.weight" not in name)


def test_only_updates_of_what_is_not_frozen_train():
    model, engine = adapted(settings(freeze=("text", "vision.blocks.0-1")))
    take_steps(engine)
    trained = {fragment.name for fragment in engine.state_fragments()}
    block = "visual.blocks.2"
    assert trained == {
        f"{block}.{where}.parametrizations.weight.0.{part}"
        for where in ("attn.q_proj", "mlp.w3")
        for part in ("up", "down")
    }
    given = small_model().state_dict()
    changed = {
        k for k, v in released_tensors(model).items() if not torch.equal(v, given[k].view_as(v))
    }
    assert changed == {f"{block}.attn.q_proj.weight", f"{block}.mlp.w3.weight"}


def test_a_checkpoint_of_updates_goes_on_exactly(tmp_path):
    config = settings()
    whole, through = adapted(config)
    take_steps(through)
    progress = TrainingProgress(2, through.step_counters(), {}, 1.0, {})
    save_checkpoint(tmp_path, through.state_fragments(), progress, keep=1)
    take_steps(through)
    model, engine = adapted(config)
    found = load_newest(tmp_path, engine.state_fragments(), {})
    engine.restore_counters(found.counters)
    take_steps(engine)
    ours, theirs = released_tensors(model), released_tensors(whole)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_stage_of_two_ranks_trains_updates(ranks, tiny_data, tmp_path):
    lora = {"rank": 2, "alpha": 2, "on": ["proj", "c_fc"]}
    short = {"samples_seen": 4 * 24, "optimizer": "adamw", "lora": lora}
    job = job_of(tiny_data, tmp_path / "run", **short)
    rows = finish(ranks, start(ranks, 2, job), job)
    assert len(rows) == 4
    made = open_model(tmp_path / "run" / "model").state_dict()
    given = open_model(tiny_data / "start").state_dict()
    changed = {name for name, value in made.items() if not torch.equal(value, given[name])}
    assert {name.split(".")[-2] for name in changed} == {"proj", "c_fc"}
    assert "visual.patch_embed.proj.weight" not in changed


@pytest.mark.parametrize("family", FAMILIES)
def test_an_architecture_names_every_matrix_of_its_blocks(family):
    model = small_model(family)
    for tower, part in {"vision": model.visual, "text": model.text}.items():
        there = [
            name.replace("_weight", ".weight").split(".")[-2]
            for name, value in part.named_parameters()
            if "blocks.0" in name and value.ndim == 2
        ]
        assert sorted(there) == sorted(model.config.projections[tower])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"on": ["qkv"]},
            "'qkv', which is not a projection of this model: choose of vision: q_proj",
        ),
        ({"on": ["text.w1"]}, "lora.on names 'text.w1'"),
        ({"rank": 48}, r"lora.rank = 48 is not below the sides of text\.\S*c_proj|in_proj"),
        ({"freeze": ("vision", "text")}, "freeze leaves no projection of lora.on"),
    ],
)
def test_updates_that_fit_nothing_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        adapted(settings(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "lamb"}, "lora needs optimizer = 'adamw'"),
        ({"ema_decay": 0.9}, "lora excludes ema_decay"),
        ({"on": []}, "at least 1 item"),
    ],
)
def test_settings_that_do_not_go_with_updates_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        settings(**changes)


def test_a_stage_without_updates_has_the_identity_of_before():
    assert "lora" not in settings(lora=None).compute_identity()
