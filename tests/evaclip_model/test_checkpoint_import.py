"""DeepSpeed's own checkpoints, written by DeepSpeed, become ours with all their state."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evaclip_model.cli import main
from evaclip_model.create import create_model
from evaclip_model.errors import InputError
from evaclip_model.model.model_config import ModelConfig
from evaclip_model.training.checkpoint.deepspeed_import import import_checkpoint
from evaclip_model.training.checkpoint.save_and_load import load_newest, settings_of
from evaclip_model.training.config import TrainConfig, TrainJob
from evaclip_model.training.engine.engine import StateFragment
from evaclip_model.weights.load import save_model
from evaclip_model.weights.name_maps import foreign_names

RANK = Path(__file__).with_name("deepspeed_rank.py")
TINY = {
    "embed_dim": 8,
    "vision": {
        "image_px": 8,
        "patch_px": 4,
        "width": 8,
        "layers": 1,
        "heads": 2,
        "mlp_width": 21,
        "mlp": "swiglu",
        "fused_qkv": False,
        "sub_norm": True,
        "norm_placement": "pre",
        "rope_reference_grid": 4,
        "layer_scale_init": None,
    },
    "text": {"context_length": 8, "vocab_size": 50, "width": 8, "layers": 1, "heads": 2},
}


def settings(**changes):
    sizes = {"image_px": 8, "samples_seen": 240, "global_batch": 12, "lanes": 6}
    return TrainConfig(name="x", **sizes, **changes)


@pytest.fixture(scope="module")
def architecture():
    return ModelConfig.model_validate(TINY)


@pytest.fixture(scope="module")
def weights(architecture, tmp_path_factory):
    """Layout -> a file of the tiny model's parameters by that layout's names."""
    folder = tmp_path_factory.mktemp("weights")
    native = dict(create_model(architecture, seed=0).named_parameters())
    for layout in ("native", "open_clip"):
        tensors = {}
        for entry in foreign_names(native, layout):
            tensors |= entry.split_native(native[entry.native].detach())
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / layout)
    return folder


@pytest.fixture(scope="module")
def written(ranks, weights, tmp_path_factory):
    """A DeepSpeed checkpoint of two ranks: its folder."""
    return write(ranks, weights, tmp_path_factory.mktemp("deepspeed"), 2, "fp32", 1)


def write(ranks, weights, folder, count, precision, stage, layout="native"):
    options = json.dumps({"precision": precision, "stage": stage})
    ranks.run(count, folder, RANK, weights / layout, folder, options)
    return folder


def blanks(architecture, config):
    model = create_model(architecture, seed=1)
    kinds = ("param", "exp_avg", "exp_avg_sq", *(["ema"] if config.ema_decay else []))
    return {
        name: StateFragment(
            name, 0, {kind: torch.full((value.numel(),), float("nan")) for kind in kinds}
        )
        for name, value in model.named_parameters()
        if not config.is_frozen(name)
    }


def assert_taken_up(source, into, architecture, config, layout="native"):
    """Imports, loads as the trainer would, and compares every value with what DeepSpeed says."""
    import_checkpoint(source, into, config, architecture)
    read = blanks(architecture, config)
    found = load_newest(into, list(read.values()), settings_of(config, architecture))
    truth = load_file(source / "truth" if (source / "truth").exists() else source.parent / "truth")
    for entry in foreign_names(create_model(architecture, seed=0).state_dict(), layout):
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            if entry.native in read:
                sources = {key: truth[f"{key}#{kind}"] for key in entry.sources}
                expected = entry.join_sources(sources).reshape(-1)
                assert torch.equal(read[entry.native].tensors[kind], expected), entry.native
                assert expected.abs().sum() > 0 or kind == "param"
    return found, read


@pytest.mark.parametrize(
    ("count", "precision", "stage", "layout"),
    [(1, "bf16", 2, "native"), (2, "fp16", 1, "native"), (2, "bf16", 1, "open_clip")],
)
def test_state_comes_over_to_the_bit(
    ranks, weights, architecture, tmp_path, count, precision, stage, layout
):
    write(ranks, weights, tmp_path, count, precision, stage, layout)
    config = settings(precision=precision)
    found, _ = assert_taken_up(tmp_path, tmp_path / "ours", architecture, config, layout)
    assert (found.step, found.counters["updates"], found.samples) == (4, 4, 48)
    scaler = {"cur_scale": 256, "cur_iter": 4, "last_overflow_iter": -1, "cur_hysteresis": 2}
    assert found.counters["scaler"] == (scaler if precision == "fp16" else {})


def test_a_universal_one_comes_over_too(ranks, written, architecture, tmp_path):
    universal = tmp_path / "universal"
    convert = ["deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    convert += ["--num_extract_workers", 1, "--num_merge_workers", 1]
    convert += ["--input_folder", written / "mine", "--output_folder", universal]
    ranks.run(1, tmp_path, *convert)
    shutil.copy(written / "truth", universal / "truth")
    found, _ = assert_taken_up(universal, tmp_path / "ours", architecture, settings())
    assert (found.step, found.counters["updates"]) == (4, 4)


def test_frozen_parts_have_no_state_and_a_running_mean_starts_at_the_weights(
    written, architecture, tmp_path
):
    config = settings(freeze=("text",), ema_decay=0.9)
    _, read = assert_taken_up(written, tmp_path / "ours", architecture, config)
    assert not any(name.startswith("text.") for name in read)
    assert all(torch.equal(one.tensors["ema"], one.tensors["param"]) for one in read.values())


def refused(why, source, into, architecture, config=None):
    with pytest.raises(InputError, match=why) as caught:
        import_checkpoint(source, into, config or settings(), architecture)
    assert "\n" not in str(caught.value)
    assert not into.exists()


def test_what_cannot_be_taken_is_refused_in_one_sentence(written, architecture, tmp_path):
    into = tmp_path / "ours"
    copy = shutil.copytree(written, tmp_path / "copy") / "mine"
    shard = copy / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    refused(r"rank_1_.*states.pt cannot be read .* cut off", copy, into, architecture)
    shard.unlink()
    refused("rank_1_.*states.pt is missing", copy, into, architecture)
    torch.save({"optimizer_state_dict": {}}, shard)
    refused("is not a ZeRO-1, ZeRO-2 or universal checkpoint", copy, into, architecture)
    torch.save({"optimizer_state_dict": Path("x")}, shard)
    refused(
        f"holds objects of {type(Path()).__module__}.PosixPath, and opening it",
        copy,
        into,
        architecture,
    )
    refused("model_states.pt is missing", tmp_path / "nowhere", into, architecture)
    wide = architecture.model_copy(update={"embed_dim": 16})
    refused(r"holds '.*' in shape \[8, 8\], and the architecture", written, into, wide)


def test_checkpoints_that_are_there_are_left_alone(written, architecture, tmp_path):
    import_checkpoint(written, tmp_path, settings(), architecture)
    with pytest.raises(InputError, match="holds checkpoints already"):
        import_checkpoint(written, tmp_path, settings(), architecture)


def test_the_command_starts_a_run_there(written, architecture, tmp_path, capsys):
    save_model(create_model(architecture, seed=0), tmp_path / "start")
    config = settings()
    job = TrainJob(
        train=config, start_from=tmp_path / "start", shards="shards.json", run_dir=tmp_path
    )
    (tmp_path / "train.json").write_text(job.model_dump_json())
    assert main(["take-over", str(written), str(tmp_path / "train.json")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/checkpoints: step 4 of 20\n"
    read = list(blanks(architecture, config).values())
    found = load_newest(tmp_path / "checkpoints", read, settings_of(config, architecture))
    assert found is not None
    assert main(["take-over", str(written), str(tmp_path / "none.json")]) == 2
    assert "none.json cannot be read as a training job" in capsys.readouterr().err
    for content, said in (("[1, 2]", "should hold a JSON object"), ("[" * 100_000, "cannot be")):
        (tmp_path / "odd.json").write_text(content)
        assert main(["take-over", str(written), str(tmp_path / "odd.json")]) == 2
        assert f"odd.json {said}" in capsys.readouterr().err
