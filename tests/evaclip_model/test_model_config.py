"""Architectures as data: names, aliases, our own and the authors' form, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from evaclip_model.errors import InputError
from evaclip_model.model.clip import EvaClip
from evaclip_model.model.model_config import ALIASES, ModelConfig, list_models

DATA = Path(__file__).parent / "data" / "models"
PUBLISHED = json.loads((DATA / "authors_configs.json").read_text())
OURS = {
    "embed_dim": 16,
    "vision": {
        "image_px": 16,
        "patch_px": 4,
        "width": 24,
        "layers": 2,
        "heads": 3,
        "mlp_width": 40,
        "mlp": "swiglu",
        "fused_qkv": False,
        "sub_norm": True,
        "norm_placement": "pre",
        "rope_reference_grid": 4,
    },
    "text": {"context_length": 12, "vocab_size": 50, "width": 20, "layers": 2, "heads": 2},
}
THEIRS = {
    "embed_dim": 16,
    "vision_cfg": {
        "eva_model_name": "small",
        "image_size": 56,
        "patch_size": 14,
        "layers": 2,
        "width": 96,
        "head_width": 32,
        "mlp_ratio": 2.6667,
        "rope": True,
        "intp_freq": True,
        "naiveswiglu": True,
        "subln": True,
    },
    "text_cfg": {"width": 24, "heads": 2, "layers": 1},
}


def changed(config: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    config = copy.deepcopy(config)
    *tables, last = key.split(".")
    table = config
    for name in tables:
        table = table[name]
    table[last] = value
    return config


def test_the_paper_s_eight_models_are_listed():
    assert set(list_models()) == {
        "EVA01-CLIP-B-16",
        "EVA01-CLIP-g-14",
        "EVA01-CLIP-g-14-plus",
        "EVA02-CLIP-B-16",
        "EVA02-CLIP-L-14",
        "EVA02-CLIP-L-14-336",
        "EVA02-CLIP-E-14",
        "EVA02-CLIP-E-14-plus",
        "EVA02-CLIP-demo",
    }


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_the_authors_names_of_e_are_accepted(alias: str, name: str):
    assert alias.replace("bigE", "E") == name
    assert ModelConfig.load(alias) == ModelConfig.load(name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_authors_files_describe_the_shipped_architectures(name: str, tmp_path: Path):
    (tmp_path / "theirs.json").write_text(json.dumps(PUBLISHED[name]))
    shipped = ModelConfig.load(name)
    assert ModelConfig.load(PUBLISHED[name]) == shipped
    assert ModelConfig.load(tmp_path / "theirs.json") == shipped


def test_only_the_g_of_the_authors_has_stochastic_depth():
    depths = {name: ModelConfig.load(name).vision.drop_path for name in list_models()}
    assert {name: depth for name, depth in depths.items() if depth} == {"EVA01-CLIP-g-14": 0.4}


def test_what_the_authors_form_leaves_out_has_their_defaults():
    config = ModelConfig.load(
        {"embed_dim": 8, "vision_cfg": {"eva_model_name": "x"}, "text_cfg": {}}
    )
    vision, text = config.vision, config.text
    assert (vision.image_px, vision.patch_px, vision.layers, vision.width) == (224, 16, 12, 768)
    assert (vision.heads, vision.mlp_width, vision.mlp) == (12, 3072, "gelu")
    assert (vision.layer_scale_init, vision.rope_reference_grid) == (None, None)
    assert (vision.drop_path, vision.pooling) == (0.0, "class_token")
    assert (text.context_length, text.vocab_size) == (77, 49_408)
    assert (text.width, text.heads, text.layers) == (512, 8, 12)


@pytest.mark.parametrize(
    ("key", "value", "field", "expected"),
    [
        ("vision_cfg.global_average_pool", True, "pooling", "mean"),
        ("vision_cfg.drop_path_rate", None, "drop_path", 0.0),
        ("vision_cfg.drop_path_rate", 0.3, "drop_path", 0.3),
        ("vision_cfg.ls_init_value", 0, "layer_scale_init", None),
        ("vision_cfg.ls_init_value", 1e-5, "layer_scale_init", 1e-5),
        ("vision_cfg.postnorm", True, "norm_placement", "residual_post"),
        ("vision_cfg.image_size", [56, 56], "image_px", 56),
        ("vision_cfg.rope", False, "rope_reference_grid", None),
        ("vision_cfg.pt_hw_seq_len", 4, "rope_reference_grid", 4),
        ("vision_cfg.subln", False, "fused_qkv", True),
        ("vision_cfg.mlp_ratio", 2.9999, "mlp_width", 287),
    ],
)
def test_each_setting_of_the_authors_has_its_field(
    key: str, value: object, field: str, expected: object
):
    assert getattr(ModelConfig.load(changed(THEIRS, key, value)).vision, field) == expected


@pytest.mark.parametrize("key", ["vision_cfg.xattn", "vision_cfg.fusedLN", "text_cfg.xattn"])
def test_what_only_made_their_code_faster_has_no_effect(key: str):
    assert ModelConfig.load(changed(THEIRS, key, True)) == ModelConfig.load(THEIRS)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vision_cfg.sublm", True, "unknown key 'vision_cfg.sublm'; did you mean 'subln'"),
        ("quick_gelu", True, "'quick_gelu' can only be false here, because every published"),
        ("vision_cfg.qkv_bias", False, "'vision_cfg.qkv_bias' can only be true here"),
        ("vision_cfg.patch_dropout", 0.5, "masking is a setting of training"),
        ("vision_cfg.timm_model_name", "eva02", "only EVA image towers and CLIP text towers"),
        ("vision_cfg.intp_freq", False, "must be true: rope positions .* grid of 4 patches"),
        ("vision_cfg.naiveswiglu", False, "subln needs naiveswiglu"),
        ("vision_cfg.image_size", [56, 70], "'vision_cfg.image_size' must be square"),
        ("vision_cfg.image_size", 57, "image_px 57 is not a multiple of patch_px 14"),
        ("vision_cfg.layers", [3, 4, 6, 3], "'vision_cfg.layers' should be a valid integer"),
        ("vision_cfg.eva_model_name", "", "'vision_cfg.eva_model_name'"),
        ("text_cfg.hf_model_name", "roberta", "'text_cfg.hf_model_name' can only be null here"),
        ("text_cfg.attn_mask", False, "every published text tower is causal"),
        ("text_cfg.ls_init_value", 0.1, "no published text tower has layer scale"),
    ],
)
def test_what_would_change_results_is_refused_by_name(key: str, value: object, message: str):
    with pytest.raises(InputError, match=message):
        ModelConfig.load(changed(THEIRS, key, value))


def test_half_of_an_architecture_is_no_architecture():
    with pytest.raises(InputError, match="'text_cfg' is missing"):
        ModelConfig.load({"embed_dim": 8, "vision_cfg": {"eva_model_name": "x"}})


def test_rope_that_fits_the_grid_needs_no_scaling():
    fitting = changed(changed(THEIRS, "vision_cfg.pt_hw_seq_len", 4), "vision_cfg.intp_freq", False)
    assert ModelConfig.load(fitting).vision.rope_reference_grid == 4


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vision.patch_px", 5, "not a multiple of patch_px 5"),
        ("vision.heads", 12, "head width divisible by 4, not 2"),
        ("vision.mlp", "gelu", "sub_norm needs the swiglu MLP"),
        ("vision.drop_path", 1.0, "'vision.drop_path' should be less than 1"),
        ("vision.pooling", "max", "'vision.pooling'"),
        ("text.widht", 3, "did you mean 'width'"),
    ],
)
def test_a_wrong_architecture_is_one_sentence(key: str, value: object, message: str):
    with pytest.raises(InputError, match=message):
        ModelConfig.load(changed(OURS, key, value))


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'EVA02-CLIP-B-16'"):
        ModelConfig.load("EVA02-CLIP-B16")
    with pytest.raises(InputError, match="did you mean 'EVA02-CLIP-bigE-14-plus'"):
        ModelConfig.load("EVA02-CLIP-bigE-14+plus")


def test_a_file_that_is_no_config_is_named(tmp_path: Path):
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(InputError, match=r"list\.json cannot be read as a model config"):
        ModelConfig.load(tmp_path / "list.json")
    with pytest.raises(InputError, match=r"none\.json cannot be read as a model config"):
        ModelConfig.load(tmp_path / "none.json")


def test_a_config_at_another_size_changes_nothing_else():
    config = ModelConfig.load("EVA02-CLIP-L-14")
    assert config.at_image_px(336) == ModelConfig.load("EVA02-CLIP-L-14-336")
    with pytest.raises(InputError, match="not a multiple"):
        config.at_image_px(300)


def test_a_config_survives_being_written():
    config = ModelConfig.load("EVA01-CLIP-g-14")
    assert ModelConfig.load(json.loads(config.model_dump_json())) == config


def test_a_model_of_the_authors_form_is_built():
    model = EvaClip(ModelConfig.load(THEIRS))
    assert model.visual.head.weight.shape == (16, 96)
