"""Names of weights in every checkpoint layout, both ways."""

from __future__ import annotations

import pytest
import torch

from evaclip_model.errors import InputError
from evaclip_model.model.clip import EvaClip
from evaclip_model.model.model_config import ModelConfig, list_models
from evaclip_model.weights.load import released_tensors
from evaclip_model.weights.name_maps import Layout, foreign_names, may_lack, native_names
from tests.evaclip_model.small_models import FAMILIES, small_config, small_model

LAYOUTS: tuple[Layout, ...] = (
    "native",
    "open_clip",
    "openai",
    "timm",
    "transformers",
    "eva_vision",
)


def in_layout(model: EvaClip, layout: Layout) -> dict[str, torch.Tensor]:
    tensors = released_tensors(model)
    found: dict[str, torch.Tensor] = {}
    for entry in foreign_names(tensors, layout):
        found |= entry.split_native(tensors[entry.native])
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_come_back_from_every_layout_as_they_were(family, layout):
    model = small_model(family)
    expected = released_tensors(model)
    there = in_layout(model, layout)
    names = native_names(there)
    assert names.ignored == ()
    towers = {"timm": "visual.", "eva_vision": "visual.", "transformers": "text."}
    prefix = towers.get(layout, "")
    assert {entry.native for entry in names.entries} == {
        k for k in expected if k.startswith(prefix)
    }
    shapes = {key: value.shape for key, value in there.items()}
    for entry in names.entries:
        back = entry.join_sources(there)
        assert torch.equal(back, expected[entry.native]), entry
        assert entry.native_shape(shapes) == back.shape, entry


@pytest.mark.parametrize("name", list_models())
def test_no_weight_of_a_shipped_model_is_lost_or_doubled_in_another_layout(name):
    with torch.device("meta"):
        keys = list(EvaClip(ModelConfig.load(name)).state_dict())
    for layout in LAYOUTS:
        entries = foreign_names(keys, layout)
        sources = [source for entry in entries for source in entry.sources]
        assert len(set(sources)) == len(sources)
        assert set(native_names(sources).entries) == set(entries)
    assert len(foreign_names(keys, "open_clip")) == len(keys)


def test_timm_names_the_parts_of_eva02_as_its_own_model_does():
    keys = in_layout(small_model("EVA-02"), "timm")
    block = {key.removeprefix("blocks.2.") for key in keys if key.startswith("blocks.2.")}
    expected = {f"norm{n}.{leaf}" for n in (1, 2) for leaf in ("weight", "bias")}
    expected |= {f"attn.{part}_proj.weight" for part in "qkv"}
    expected |= {"attn.q_proj.bias", "attn.v_proj.bias"}
    for part in ("attn.norm", "attn.proj", "mlp.fc1_g", "mlp.fc1_x", "mlp.norm", "mlp.fc2"):
        expected |= {f"{part}.weight", f"{part}.bias"}
    assert block == expected


def test_timm_and_eva_call_a_tower_with_fused_weights_and_gelu_the_same():
    for family in ("EVA-01", "EVA-02-E"):
        model = small_model(family)
        assert in_layout(model, "timm").keys() == in_layout(model, "eva_vision").keys()


def test_transformers_splits_the_joint_input_projection_and_turns_the_last_one():
    model = small_model()
    there = in_layout(model, "transformers")
    layer = "text_model.encoder.layers.1.self_attn"
    joint = model.text.transformer.resblocks[1].attn.in_proj_weight
    for number, part in enumerate("qkv"):
        assert torch.equal(
            there[f"{layer}.{part}_proj.weight"], joint[48 * number : 48 * (number + 1)]
        )
    assert torch.equal(there["text_projection.weight"], model.text.text_projection.T)


def test_transformers_text_model_alone_may_be_without_prefix():
    model = small_model()
    there = in_layout(model, "transformers")
    bare = {
        key.removeprefix("text_model."): v for key, v in there.items() if "projection" not in key
    }
    names = native_names(bare)
    assert names.layout == "transformers"
    expected = {k for k in released_tensors(model) if k.startswith("text.")} - {
        "text.text_projection"
    }
    assert {entry.native for entry in names.entries} == expected


def test_what_transformers_clip_holds_beside_its_text_tower_is_no_weight_of_ours():
    there = dict.fromkeys(in_layout(small_model(), "transformers"))
    extra = (
        "vision_model.embeddings.class_embedding",
        "visual_projection.weight",
        "text_model.embeddings.position_ids",
    )
    names = native_names([*extra, *there, "logit_scale"])
    assert names.ignored == extra
    assert "logit_scale" in {entry.native for entry in names.entries}


def test_a_whole_eva02_checkpoint_may_hold_its_rope_tables():
    keys = list(released_tensors(small_model()))
    tables = [f"visual.{at}rope.freqs_{f}" for at in ("", "blocks.0.attn.") for f in ("cos", "sin")]
    names = native_names([*tables, *keys])
    assert names.layout == "native"
    assert names.ignored == tuple(tables)
    assert [entry.native for entry in names.entries] == keys


def test_a_pretraining_file_is_told_by_its_heads_and_by_a_missing_head():
    keys = list(in_layout(small_model(), "eva_vision"))
    tower = [key for key in keys if not key.startswith("head.") and "inner_attn_ln" not in key]
    heads = ["mask_token", "lm_head.weight", "lm_head.bias", "rope.freqs_cos", "rope.freqs_sin"]
    heads += ["blocks.1.attn.rope.freqs_cos"]
    assert native_names(keys).layout == "eva_vision"
    assert native_names(tower).layout == "eva_mim"
    names = native_names([*heads, *tower])
    assert (names.layout, names.ignored) == ("eva_mim", tuple(heads))
    missing = set(released_tensors(small_model())) - {entry.native for entry in names.entries}
    missing = {key for key in missing if key.startswith("visual.")}
    assert missing and all(may_lack("eva_mim", key) for key in missing)
    assert not any(may_lack("eva_vision", key) for key in missing)


def test_openai_scalars_are_ignored_and_its_image_tower_is_reported_as_unknown():
    text = [key for key in in_layout(small_model(), "openai") if not key.startswith("visual.")]
    scalars = ("input_resolution", "context_length", "vocab_size")
    names = native_names([*scalars, *text, "visual.class_embedding", "attn_mask"])
    assert names.layout == "openai"
    assert names.ignored == (*scalars, "attn_mask")
    given = {entry.native for entry in names.entries}
    ours = {k for k in released_tensors(small_model()) if not k.startswith("visual.")}
    assert given == ours | {"visual.class_embedding"}


@pytest.mark.parametrize(
    ("layout", "extra", "expected"),
    [
        ("native", "text.logit_bias", "text.logit_bias"),
        ("openai", "logit_bias", "logit_bias"),
        ("open_clip", "visual.head.proj.weight", "visual.head.proj.weight"),
        ("timm", "blocks.0.attn.gate.weight", "visual.blocks.0.attn.gate.weight"),
        ("transformers", "text_model.head.weight", "text.text_model.head.weight"),
    ],
)
def test_an_unknown_key_is_kept_so_that_it_can_be_reported(layout, extra, expected):
    names = native_names([*in_layout(small_model(), layout), extra])
    assert names.layout == layout
    assert [e.native for e in names.entries if extra in e.sources] == [expected]


def test_a_third_of_a_stacked_weight_alone_does_not_pass_for_the_whole():
    keys = list(in_layout(small_model(), "transformers"))
    lost = "text_model.encoder.layers.0.self_attn.k_proj.weight"
    keys.remove(lost)
    given = {entry.native for entry in native_names(keys).entries}
    assert "text.transformer.resblocks.0.attn.in_proj_weight" not in given
    assert "text.text_model.encoder.layers.0.self_attn.q_proj.weight" in given


@pytest.mark.parametrize("keys", [[], ["conv1.weight", "fc.bias"], ["bert.pooler.dense.weight"]])
def test_keys_of_no_known_layout_are_an_error_that_names_one(keys):
    with pytest.raises(InputError, match=r"weights\.pt has the keys of no layout") as caught:
        native_names(keys, where="weights.pt")
    assert all(key in str(caught.value) for key in keys[:1])


def test_mean_pooling_keeps_the_name_of_its_norm():
    model = EvaClip(ModelConfig.load(small_config("EVA-01", pooling="mean")))
    assert {"fc_norm.weight", "fc_norm.bias"} <= in_layout(model, "eva_vision").keys()
