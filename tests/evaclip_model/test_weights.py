"""Saving, opening, and starting from other files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evaclip_model.clip import EvaClip
from evaclip_model.create import create_model, open_model
from evaclip_model.errors import InputError
from evaclip_model.model_config import ModelConfig
from evaclip_model.weights import load_weights, resize_positions, save_model

CONFIG = ModelConfig.load(
    {
        "embed_dim": 12,
        "vision": {
            "image_px": 16,
            "patch_px": 4,
            "width": 16,
            "layers": 2,
            "heads": 2,
            "mlp_width": 24,
            "mlp": "swiglu",
            "fused_qkv": False,
            "sub_norm": True,
            "norm_placement": "pre",
            "rope_reference_grid": 4,
        },
        "text": {"context_length": 8, "vocab_size": 30, "width": 16, "layers": 1, "heads": 2},
    }
)


def model(seed: int = 0, config: ModelConfig = CONFIG) -> EvaClip:
    return create_model(config, seed=seed)


def released(source: EvaClip) -> dict[str, Tensor]:
    """A state dict as released checkpoints have it, RoPE tables included."""
    state = {key: value.clone() for key, value in source.state_dict().items()}
    state["logit_scale"] = state["logit_scale"].squeeze(0)
    state["visual.rope.freqs_cos"] = torch.ones(256, 8)
    state["visual.blocks.0.attn.rope.freqs_cos"] = torch.ones(16, 16, 8)
    return state


def assert_equal(one: EvaClip, other: EvaClip, prefix: str = "") -> None:
    first, second = one.state_dict(), other.state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first if k.startswith(prefix))


def test_a_saved_model_opens_as_it_was(tmp_path: Path):
    original = model()
    save_model(original, tmp_path / "model")
    opened = open_model(tmp_path / "model")
    assert opened.config == original.config
    assert not opened.training
    assert_equal(opened, original)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_the_saved_file_has_the_released_names_and_shapes(tmp_path: Path):
    save_model(model(), tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved["logit_scale"].shape == ()
    assert not [key for key in saved if "rope" in key]


def test_opening_in_half_precision_keeps_half_the_bytes(tmp_path: Path):
    save_model(model(), tmp_path)
    assert {p.dtype for p in open_model(tmp_path, "bf16").parameters()} == {torch.bfloat16}


def test_another_resolution_gets_resized_positions(tmp_path: Path):
    save_model(model(), tmp_path)
    larger = model(1, CONFIG.at_image_px(24))
    report = load_weights(larger, tmp_path)
    assert report.resized == ("visual.pos_embed",)
    assert report.kept == ()
    torch.testing.assert_close(
        larger.visual.pos_embed.detach(), resize_positions(model().visual.pos_embed.detach(), 6)
    )
    assert larger(torch.zeros(1, 3, 24, 24), torch.tensor([[28, 29]]))[0].shape == (1, 12)


def test_a_released_checkpoint_loads_with_its_tables_ignored(tmp_path: Path):
    path = tmp_path / "released.pt"
    torch.save({"module": {f"module.{k}": v for k, v in released(model()).items()}}, path)
    target = model(1)
    report = load_weights(target, path)
    assert_equal(target, model())
    assert len(report.ignored) == 2
    assert report.kept == ()


def test_a_pretraining_file_fills_the_image_tower_but_not_its_head(tmp_path: Path):
    state = {
        key.removeprefix("visual."): value
        for key, value in released(model()).items()
        if key.startswith("visual.") and ".inner_attn_ln." not in key and ".head." not in key
    }
    state |= {"mask_token": torch.zeros(1, 1, 16), "lm_head.weight": torch.zeros(5, 16)}
    save_file(state, tmp_path / "mim.safetensors")
    target = model(1)
    report = load_weights(target, tmp_path / "mim.safetensors", "vision")
    assert_equal(target, model(), "visual.blocks")
    assert_equal(target, model(1), "text.")
    assert_equal(target, model(1), "visual.head.")
    assert sum(".inner_attn_ln." in key for key in report.kept) == 4


def test_an_unprefixed_text_tower_loads_without_its_projection(tmp_path: Path):
    state = {
        key.removeprefix("text."): value
        for key, value in released(model()).items()
        if "visual." not in key
    }
    torch.save({**state, "context_length": torch.tensor(8)}, tmp_path / "openai.pt")
    target = model(1)
    load_weights(target, tmp_path / "openai.pt", "text")
    assert_equal(target, model(), "text.transformer")
    assert_equal(target, model(1), "text.text_projection")
    assert_equal(target, model(1), "visual.")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("visual.norm.weight"), "lacks 'visual.norm.weight'"),
        (lambda s: s.update({"visual.extra": torch.zeros(1)}), "unknown tensor 'visual.extra'"),
        (
            lambda s: s.update({"visual.norm.weight": torch.zeros(9)}),
            r"'visual.norm.weight' has shape \[9\], but the model needs \[16\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_one_sentence_and_change_nothing(tmp_path, change, message):
    state = released(model())
    change(state)
    save_file(state, tmp_path / "wrong.safetensors")
    target = model(1)
    with pytest.raises(InputError, match=message):
        load_weights(target, tmp_path / "wrong.safetensors")
    assert_equal(target, model(1))


@pytest.mark.parametrize("part", ["vision", "text"])
def test_a_file_without_the_tower_is_refused(tmp_path: Path, part):
    save_file({"something": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=f"no weights of a {part} tower"):
        load_weights(model(), tmp_path / "other.safetensors", part)


def test_a_file_that_would_run_code_is_not_opened(tmp_path: Path):
    torch.save({"logit_scale": Path("anything")}, tmp_path / "code.pt")
    with pytest.raises(InputError, match=r"code\.pt"):
        load_weights(model(), tmp_path / "code.pt")


def test_a_truncated_file_and_a_missing_folder_are_one_sentence(tmp_path: Path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0")
    with pytest.raises(InputError, match="cannot be read as weights"):
        load_weights(model(), tmp_path / "cut.safetensors")
    with pytest.raises(InputError, match=r"is no saved model: it has no config\.json"):
        open_model(tmp_path)
