"""Parameter groups and the schedule against numbers from the authors' training code."""

import json
from pathlib import Path

import pytest
import torch

from evaclip_model.errors import InputError
from evaclip_model.training.config import TrainConfig
from evaclip_model.training.optimizer.optimizer import lr_factor, parameter_groups

DATA = Path(__file__).parent / "data" / "optim"


def config(**changes):
    settings = {"name": "x", "image_px": 56, "samples_seen": 640, "global_batch": 32}
    return TrainConfig(**{**settings, **changes})


@pytest.mark.parametrize(
    ("case", "decays"), [("llrd_eva02_e", (0.9, 0.75)), ("llrd_disabled_eva02_l", (1.0, 1.0))]
)
def test_groups_equal_the_authors(case, decays):
    expected = json.loads((DATA / f"{case}.json").read_text())
    lr_vision = expected["params"]["visual.cls_token"]["base_lr"]
    settings = config(lr_vision=lr_vision, layer_decay_vision=decays[0], layer_decay_text=decays[1])
    # Only the number of dimensions matters to grouping: 1 where the authors did not decay by shape.
    shapes = [
        (name, torch.Size([2] if values["weight_decay"] == 0 and not _is_table(name) else [2, 2]))
        for name, values in expected["params"].items()
    ]

    groups = parameter_groups(shapes, settings)

    got = {
        name: (group.tower, group.lr_peak, group.weight_decay)
        for group in groups
        for name in group.names
    }
    towers = {"visual": "vision", "text": "text", "other": "other"}
    for name, values in expected["params"].items():
        tower, lr, decay = got[name]
        assert tower == towers[values["tower"]]
        assert decay == values["weight_decay"]
        if tower == "text":
            lr *= values["base_lr"] / settings.lr_text
        assert lr == pytest.approx(values["effective_peak_lr"], rel=1e-12)
    assert {frozenset(group.names) for group in groups} == {
        frozenset(group["params"]) for group in expected["groups"]
    }


def _is_table(name):
    return name.split(".")[-1] in ("pos_embed", "cls_token", "positional_embedding")


def test_learning_rates_equal_the_authors_schedule():
    expected = json.loads((DATA / "lr_schedule.json").read_text())
    peaks = {"visual": 2e-4, "text": 2e-5, "other": 5e-4}
    for row in expected["table"]:
        factor = lr_factor(row["step"], expected["warmup"], expected["total_steps"])
        for (tower, scale), lr in zip(
            expected["group_index_to_tower_scale"], row["lrs"], strict=True
        ):
            assert factor * peaks[tower] * scale == pytest.approx(lr, rel=1e-9, abs=1e-18)


def test_schedule_without_warmup_starts_at_the_peak():
    assert lr_factor(0, 0, 10) == 1


def test_schedules_warm_up_alike_and_end_where_their_names_say():
    for schedule in ("cosine", "linear", "constant"):
        assert [lr_factor(step, 4, 12, schedule) for step in range(4)] == [0.25, 0.5, 0.75, 1]
        assert lr_factor(4, 4, 12, schedule) == 1
    assert [lr_factor(8, 4, 12, name) for name in ("cosine", "linear", "constant")] == [
        pytest.approx(0.5),
        0.5,
        1,
    ]
    assert [lr_factor(12, 4, 12, name) for name in ("cosine", "linear", "constant")] == [0, 0, 1]
    assert lr_factor(99, 4, 12, "linear") == 0


def test_frozen_blocks_leave_the_rates_of_the_others_as_they_are():
    names = [f"visual.blocks.{index}.w" for index in range(12)]
    names += [f"text.transformer.resblocks.{index}.w" for index in range(4)]
    names += ["visual.patch_embed.proj.weight", "visual.head.weight", "logit_scale"]
    shapes = [(name, torch.Size([2, 2])) for name in names]
    frozen = ("vision.patch_embed", "vision.blocks.0-7", "text.blocks.3")
    every = {name: group for group in parameter_groups(shapes, config()) for name in group.names}
    left = {
        name: group
        for group in parameter_groups(shapes, config(freeze=frozen))
        for name in group.names
    }
    gone = {f"visual.blocks.{index}.w" for index in range(8)}
    gone |= {"visual.patch_embed.proj.weight", "text.transformer.resblocks.3.w"}
    assert every.keys() - left.keys() == gone
    assert all(left[name].lr_peak == every[name].lr_peak for name in left)


@pytest.mark.parametrize("part", ["visions", "vision.blocks.12-15", "vision.block.0", "text.head"])
def test_what_freeze_names_must_be_in_the_model(part):
    names = [f"visual.blocks.{index}.attn.w" for index in range(12)]
    with pytest.raises(InputError, match=f"freeze names '{part}', which this model does not have"):
        config(freeze=("vision.blocks.3.attn", part)).require_parts(names)


@pytest.mark.parametrize(
    ("freeze", "towers"),
    [(("vision",), ["other", "text"]), (("text", "logit_scale"), ["vision"]), ((), None)],
    ids=str,
)
def test_frozen_parameters_are_in_no_group_and_leave_the_others_as_they_are(freeze, towers):
    shapes = [
        (name, torch.Size([2, 2]))
        for name in (
            "visual.blocks.0.w",
            "visual.blocks.3.w",
            "text.blocks.1.w",
            "text.head",
            "logit_scale",
        )
    ]
    every = parameter_groups(shapes, config())
    left = parameter_groups(shapes, config(freeze=freeze))
    assert left == [group for group in every if towers is None or group.tower in towers]
    assert {group.tower for group in every} == {"vision", "text", "other"}
