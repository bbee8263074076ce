"""Saving, opening, and starting from other files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from evaclip_model.create import create_model, open_model
from evaclip_model.errors import InputError
from evaclip_model.model.clip import EvaClip
from evaclip_model.model.model_config import ModelConfig
from evaclip_model.weights.export import export_model
from evaclip_model.weights.load import load_weights, resize_positions, save_model, save_weights

DATA = Path(__file__).parent / "data" / "models"
WEIGHT_AND_BIAS = ("weight", "bias")
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
        "preprocessing.json",
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
    assert report.expected_gaps == ()
    torch.testing.assert_close(
        larger.visual.pos_embed.detach(), resize_positions(model().visual.pos_embed.detach(), 6)
    )
    assert larger(torch.zeros(1, 3, 24, 24), torch.tensor([[28, 29]]))[0].shape == (1, 12)


def test_a_released_checkpoint_loads_with_its_tables_ignored(tmp_path: Path):
    path = tmp_path / "released.pt"
    state = {f"module.{k}": v for k, v in released(model()).items()}
    torch.save({"model_state_dict": {"module": state}}, path)
    target = model(1)
    report = load_weights(target, path)
    assert_equal(target, model())
    assert report.layout == "native"
    assert set(report.loaded) == set(target.state_dict())
    assert report.ignored == ("visual.rope.freqs_cos", "visual.blocks.0.attn.rope.freqs_cos")
    assert report.expected_gaps == report.unexpected == report.resized == ()


def test_a_pretraining_file_fills_the_image_tower_but_not_its_head(tmp_path: Path):
    state = {
        key.removeprefix("visual."): value
        for key, value in released(model()).items()
        if key.startswith("visual.") and ".inner_attn_ln." not in key and ".head." not in key
    }
    state |= {"mask_token": torch.zeros(1, 1, 16), "lm_head.weight": torch.zeros(5, 16)}
    save_file(state, tmp_path / "mim.safetensors")
    target = model(1)
    report = load_weights(target, tmp_path / "mim.safetensors", part="vision")
    assert_equal(target, model(), "visual.blocks")
    assert_equal(target, model(1), "text.")
    assert_equal(target, model(1), "visual.head.")
    inner = {f"visual.blocks.{i}.attn.inner_attn_ln.{v}" for i in (0, 1) for v in WEIGHT_AND_BIAS}
    assert set(report.expected_gaps) == inner | {f"visual.head.{v}" for v in WEIGHT_AND_BIAS}
    assert {"mask_token", "lm_head.weight", "rope.freqs_cos"} < set(report.ignored)
    assert not [key for key in report.ignored if key.startswith("text.")]


def test_an_unprefixed_text_tower_loads_without_its_projection(tmp_path: Path):
    state = {
        key.removeprefix("text."): value
        for key, value in released(model()).items()
        if "visual." not in key
    }
    torch.save({**state, "context_length": torch.tensor(8)}, tmp_path / "openai.pt")
    target = model(1)
    report = load_weights(target, tmp_path / "openai.pt", part="text")
    assert report.layout == "openai"
    assert report.expected_gaps == ("text.text_projection",)
    assert set(report.ignored) == {"logit_scale", "text_projection", "context_length"}
    assert_equal(target, model(), "text.transformer")
    assert_equal(target, model(1), "text.text_projection")
    assert_equal(target, model(1), "visual.")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("visual.norm.weight"), "lacks 'visual.norm.weight'"),
        (lambda s: s.update({"visual.extra": torch.zeros(1)}), "holds 'visual.extra', for which"),
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


@pytest.mark.parametrize("allow_unexpected", [False, True])
@pytest.mark.parametrize(("part", "other"), [("vision", "text."), ("text", "visual.")])
def test_a_tower_that_is_not_there_never_passes(tmp_path: Path, part, other, allow_unexpected):
    state = {key: value for key, value in released(model()).items() if key.startswith(other)}
    save_file(state, tmp_path / "other.safetensors")
    target = model(1)
    with pytest.raises(InputError, match=f"no weights of a {part} tower: none of its keys match"):
        load_weights(
            target, tmp_path / "other.safetensors", part=part, allow_unexpected=allow_unexpected
        )
    assert_equal(target, model(1))


def test_a_tower_alone_is_no_whole_model(tmp_path: Path):
    state = {k: v for k, v in released(model()).items() if k.startswith("visual.")}
    save_file(state, tmp_path / "tower.safetensors")
    with pytest.raises(InputError, match=r"no text tower that matches: load .* part='vision'"):
        load_weights(model(), tmp_path / "tower.safetensors")


def test_what_was_allowed_to_be_left_out_is_reported(tmp_path: Path):
    state = released(model()) | {"visual.extra": torch.zeros(1), "other_scale": torch.zeros(1)}
    save_file(state, tmp_path / "more.safetensors")
    target = model(1)
    report = load_weights(target, tmp_path / "more.safetensors", allow_unexpected=True)
    assert set(report.unexpected) == {"visual.extra", "other_scale"}
    assert_equal(target, model())
    with pytest.raises(InputError, match="holds 'other_scale', for which"):
        load_weights(target, tmp_path / "more.safetensors", part="text")


def test_a_report_reads_as_a_sentence(tmp_path: Path):
    save_weights(model(), tmp_path / "whole.safetensors")
    target = model(1, CONFIG.at_image_px(24))
    report = load_weights(target, tmp_path / "whole.safetensors", part="vision")
    assert str(report) == (
        "native layout; 47 loaded; resized: 'visual.pos_embed'; kept at the model's values: "
        "'visual.head.weight' and 1 more; of no use: 'logit_scale' and 19 more"
    )


@pytest.mark.parametrize("file_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_file_of_another_precision_fills_the_model_in_the_models_own(tmp_path, file_dtype):
    state = {key: value.to(file_dtype) for key, value in released(model()).items()}
    torch.save(state, tmp_path / "other.pt")
    target = model(1)
    load_weights(target, tmp_path / "other.pt")
    for key, value in target.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value.reshape(-1), state[key].float().reshape(-1))


def test_a_half_precision_table_is_resized_in_single_precision(tmp_path: Path):
    half = {key: value.half() for key, value in released(model()).items()}
    save_file(half, tmp_path / "half.safetensors")
    larger = model(1, CONFIG.at_image_px(24))
    load_weights(larger, tmp_path / "half.safetensors")
    expected = resize_positions(half["visual.pos_embed"].float(), 6)
    assert torch.equal(larger.visual.pos_embed.detach(), expected)


def test_a_patch_kernel_and_its_positions_are_resized_together(tmp_path: Path):
    save_weights(model(), tmp_path / "patch4.safetensors")
    values = CONFIG.model_dump()
    values["vision"] |= {"image_px": 40, "patch_px": 8, "rope_reference_grid": 4}
    target = model(1, ModelConfig.load(values))
    report = load_weights(target, tmp_path / "patch4.safetensors")
    assert set(report.resized) == {"visual.pos_embed", "visual.patch_embed.proj.weight"}
    kernel = model().visual.patch_embed.proj.weight.detach()
    expected = F.interpolate(kernel, size=(8, 8), mode="bicubic", align_corners=False)
    assert torch.equal(target.visual.patch_embed.proj.weight.detach(), expected)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("visual.norm.weight", torch.ones(16, dtype=torch.int8), "'visual.norm.weight' has int8"),
        (
            "text.ln_final.bias",
            torch.full((16,), torch.nan),
            "'text.ln_final.bias' has values that are not finite in float32",
        ),
        (
            "visual.pos_embed",
            torch.zeros(1, 19, 16),
            r"'visual.pos_embed' has shape \[1, 19, 16\], but the model needs \[1, 17, 16\]",
        ),
        (
            "visual.patch_embed.proj.weight",
            torch.zeros(16, 1, 4, 4),
            "'visual.patch_embed.proj.weight' has shape",
        ),
        ("logit_scale", torch.zeros(2), r"'logit_scale' has shape \[2\]"),
    ],
)
def test_a_value_that_cannot_be_a_weight_is_one_sentence(tmp_path, key, value, message):
    save_file(released(model()) | {key: value}, tmp_path / "wrong.safetensors")
    with pytest.raises(InputError, match=message):
        load_weights(model(1), tmp_path / "wrong.safetensors")


def test_a_model_made_of_weights_has_its_final_dtype_and_exact_tables(tmp_path: Path):
    save_weights(model(), tmp_path / "whole.safetensors")
    made = create_model(CONFIG, weights=tmp_path / "whole.safetensors", precision="bf16")
    expected = model().to(torch.bfloat16)
    assert_equal(made, expected)
    buffers = dict(expected.named_buffers())
    assert {name for name, _ in made.named_buffers()} == set(buffers)
    for name, table in made.named_buffers():
        assert table.device.type == "cpu"
        assert torch.equal(table, buffers[name])
    batch = torch.ones(1, 3, 16, 16).bfloat16(), torch.tensor([[28, 3, 29]])
    torch.testing.assert_close(made(*batch), expected(*batch), rtol=0, atol=0)


def test_weights_are_written_as_safetensors_or_not_at_all(tmp_path: Path):
    with pytest.raises(InputError, match=r"model\.pt: weights are written as safetensors"):
        save_weights(model(), tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []


def transformers_names(source: EvaClip) -> dict[str, Tensor]:
    """The text tower as Hugging Face's CLIP files have it, beside an image tower of theirs."""
    state = source.text.state_dict()
    found = {
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "text_model.embeddings.position_ids": torch.arange(8)[None],
        "text_model.final_layer_norm.weight": state["ln_final.weight"],
        "text_model.final_layer_norm.bias": state["ln_final.bias"],
        "text_projection.weight": state["text_projection"].t().contiguous(),
        "vision_model.embeddings.class_embedding": torch.zeros(20),
        "visual_projection.weight": torch.zeros(12, 20),
        "logit_scale": torch.tensor(2.0),
    }
    here, there = "transformer.resblocks.0.", "text_model.encoder.layers.0."
    for leaf in WEIGHT_AND_BIAS:
        in_proj = state[f"{here}attn.in_proj_{leaf}"].chunk(3)
        for name, value in zip("qkv", in_proj, strict=True):
            found[f"{there}self_attn.{name}_proj.{leaf}"] = value.clone()
        for ours, theirs in {
            "attn.out_proj": "self_attn.out_proj",
            "ln_1": "layer_norm1",
            "ln_2": "layer_norm2",
            "mlp.c_fc": "mlp.fc1",
            "mlp.c_proj": "mlp.fc2",
        }.items():
            found[f"{there}{theirs}.{leaf}"] = state[f"{here}{ours}.{leaf}"]
    return found


def test_a_transformers_file_gives_its_text_tower(tmp_path: Path):
    torch.save(transformers_names(model()), tmp_path / "pytorch_model.bin")
    target = model(1)
    report = load_weights(target, tmp_path / "pytorch_model.bin", part="text")
    assert report.layout == "transformers"
    assert_equal(target, model(), "text.transformer")
    assert_equal(target, model(), "text.positional_embedding")
    assert_equal(target, model(1), "text.text_projection")
    assert_equal(target, model(1), "visual.")
    assert {"vision_model.embeddings.class_embedding", "text_projection.weight"} < set(
        report.ignored
    )
    with pytest.raises(InputError, match=r"no vision tower that matches: load .* part='text'"):
        load_weights(target, tmp_path / "pytorch_model.bin")


def test_a_file_that_would_run_code_is_not_opened(tmp_path: Path):
    torch.save({"logit_scale": Path("anything")}, tmp_path / "code.pt")
    with pytest.raises(InputError, match=r"code\.pt"):
        load_weights(model(), tmp_path / "code.pt")


def test_a_truncated_file_and_a_missing_folder_are_one_sentence(tmp_path: Path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0")
    with pytest.raises(InputError, match="cannot be read as weights"):
        load_weights(model(), tmp_path / "cut.safetensors")
    with pytest.raises(InputError, match=r"is not a saved model: it has no config\.json"):
        open_model(tmp_path)


@pytest.mark.parametrize("length", [5, 12])
def test_another_context_length_gets_cut_or_stretched_text_positions(tmp_path: Path, length: int):
    save_model(model(), tmp_path)
    target = model(1, CONFIG.at_context_length(length))
    report = load_weights(target, tmp_path)
    assert report.resized == ("text.positional_embedding",)
    before = model().text.positional_embedding.detach()
    after = target.text.positional_embedding.detach()
    if length < 8:
        assert torch.equal(after, before[:length])
    else:  # of 8 rows 7 are kept, so that the last one fills what is new
        assert torch.equal(after, torch.cat((before[:7], before[7:].expand(5, -1))))
    assert target.encode_text(torch.zeros(1, length, dtype=torch.long)).shape == (1, 12)


def test_a_stretched_model_gives_short_captions_the_features_they_had(tmp_path: Path):
    values = CONFIG.model_dump()
    values["text"]["context_length"] = 30
    short = create_model(values, seed=0)
    save_model(short, tmp_path)
    long = create_model(CONFIG.at_context_length(50), weights=tmp_path)
    rows = long.text.positional_embedding.detach()
    assert torch.equal(rows[49], short.text.positional_embedding[29])
    steps = rows[21:].diff(dim=0).norm(dim=1)  # in a line between the old rows: no jumps
    assert steps.max() < short.text.positional_embedding.diff(dim=0).norm(dim=1).max()
    caption = torch.tensor([[27, *range(1, 18), 29]])
    assert torch.equal(long.encode_text(caption), short.encode_text(caption))


def wrap_compiled(inside: EvaClip) -> nn.Module:
    wrapped: nn.Module = torch.compile(inside)  # type: ignore[assignment]
    return wrapped


def wrap_blocks(inside: EvaClip) -> nn.Module:
    inside.visual.blocks[0] = torch.compile(inside.visual.blocks[0])  # type: ignore[assignment]
    return nn.DataParallel(inside)


def wrap_ddp(inside: EvaClip) -> nn.Module:
    return wrap_compiled(nn.parallel.DistributedDataParallel(inside))  # type: ignore[arg-type]


def shard(inside: EvaClip) -> nn.Module:
    for block in inside.visual.blocks:
        fully_shard(block, mesh=init_device_mesh("cpu", (1,)))
    return fully_shard(inside, mesh=init_device_mesh("cpu", (1,)))


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrap", [wrap_compiled, wrap_blocks, wrap_ddp, shard])
def test_a_wrapped_model_is_saved_as_the_one_inside(
    tmp_path: Path, one_rank: None, wrap: Callable[[EvaClip], nn.Module]
):
    wrapped = wrap(model())
    save_model(wrapped, tmp_path / "model")
    assert_equal(open_model(tmp_path / "model"), model())
    save_weights(wrapped, tmp_path / "weights.safetensors")
    assert_equal(create_model(CONFIG, weights=tmp_path / "weights.safetensors"), model())
    files = tmp_path / "wrapped.safetensors", tmp_path / "plain.safetensors"
    for source, file in zip((wrapped, model()), files, strict=True):
        export_model(source, file, "timm")
    assert files[0].read_bytes() == files[1].read_bytes()


def test_weights_are_loaded_into_the_model_that_a_wrapper_holds(tmp_path: Path):
    save_model(model(), tmp_path)
    target = model(1)
    load_weights(wrap_compiled(target), tmp_path)
    assert_equal(target, model())


def test_what_holds_no_model_or_only_pieces_of_it_is_refused(tmp_path: Path, one_rank: None):
    with pytest.raises(InputError, match="Linear holds no EvaClip: give the model itself"):
        save_model(nn.DataParallel(nn.Linear(2, 2)), tmp_path / "model")
    with pytest.raises(InputError, match="load its weights before fully_shard"):
        load_weights(shard(model()), tmp_path)
    flat = FullyShardedDataParallel(model(), device_id=torch.device("cpu"))
    with pytest.raises(InputError, match=r"FullyShardedDataParallel \(FSDP1\) keeps the weights"):
        save_model(flat, tmp_path / "model")
    assert not (tmp_path / "model").exists()
