"""Every kind of file and folder that weights come in."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from evaclip_model.create import create_model
from evaclip_model.errors import InputError
from evaclip_model.model.clip import EvaClip
from evaclip_model.training.checkpoint.save_and_load import save_checkpoint
from evaclip_model.training.engine.engine import StateFragment
from evaclip_model.weights.checkpoint_format import TrainingProgress
from evaclip_model.weights.load import load_weights, save_model, save_weights

DEMO = "EVA02-CLIP-demo"
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source() -> EvaClip:
    return create_model(DEMO, seed=9)


@pytest.fixture(scope="module")
def state(source: EvaClip) -> dict[str, Tensor]:
    return dict(source.state_dict())


def assert_gives(path: Path, source: EvaClip, **options: bool) -> None:
    target = create_model(DEMO, seed=1)
    report = load_weights(target, path, **options)  # type: ignore[arg-type]
    expected = source.state_dict()
    assert set(report.loaded) == set(expected)
    for key, value in target.state_dict().items():
        assert torch.equal(value, expected[key]), key


def refused(path: Path, message: str, **options: bool) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_weights(create_model(DEMO, seed=1), path, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("wrappers", [(), ("model",), ("module",), ("state_dict", "module")])
def test_a_torch_file_is_read_whatever_wraps_its_weights(tmp_path, source, state, wrappers, is_zip):
    content: dict[str, object] = dict(state)
    for wrapper in reversed(wrappers):
        content = {"epoch": 3, wrapper: content}
    path = tmp_path / "weights.pt"
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    assert_gives(path, source)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_modules_that_wrap_a_model_leave_no_trace_in_names(tmp_path, source, state, prefix):
    """Also where the first key alone has no prefix: every key counts for itself."""
    first, *others = state
    save_file({first: state[first], **{prefix + k: state[k] for k in others}}, tmp_path / "w.pt")
    (tmp_path / "w.pt").rename(tmp_path / "w.safetensors")
    assert_gives(tmp_path / "w.safetensors", source)


def test_a_name_that_occurs_twice_is_refused(tmp_path, state):
    twice = {**state, "module.visual.cls_token": torch.zeros_like(state["visual.cls_token"])}
    save_file(twice, tmp_path / "w.safetensors")
    refused(tmp_path / "w.safetensors", "holds 'visual.cls_token' twice")


def test_tensors_that_share_or_skip_memory_are_read_as_they_were(tmp_path, source, state):
    stack = torch.stack([state["visual.norm.weight"], state["visual.norm.bias"]])
    content = {
        key: value.t().contiguous().t() if value.ndim == 2 else value
        for key, value in state.items()
    }
    content |= {"visual.norm.weight": stack[0], "visual.norm.bias": stack[1]}
    torch.save(content, tmp_path / "views.pt")
    assert_gives(tmp_path / "views.pt", source)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_sharded_checkpoint_is_read_by_its_index_or_its_folder(tmp_path, source, state, kind):
    places = write_shards(tmp_path, state, kind)
    index = tmp_path / f"model.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert_gives(index, source)
    assert_gives(tmp_path, source)


def write_shards(folder: Path, state: dict[str, Tensor], kind: str) -> dict[str, str]:
    places = {}
    for number in range(3):
        name = f"model-0000{number + 1}-of-00003.{kind}"
        shard = {key: state[key] for key in list(state)[number::3]}
        if kind == "bin":
            torch.save(shard, folder / name)
        else:
            save_file(shard, folder / name)
        places |= dict.fromkeys(shard, name)
    return places


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual.cls_token": "gone.safetensors"}, r"gone\.safetensors does not exist"),
        ({"visual.more": "model-00001-of-00003.safetensors"}, "lacks 'visual.more', which"),
        ({"visual.cls_token": "../model-00001-of-00003.safetensors"}, "outside its own folder"),
    ],
)
def test_an_index_that_is_wrong_is_one_sentence(tmp_path, state, change, message):
    places = write_shards(tmp_path, state, "safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places | change}))
    refused(index, message)


def test_an_index_of_another_form_is_one_sentence(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    refused(tmp_path, "is not the index of a sharded checkpoint")


def test_a_folder_of_one_file_needs_no_name_for_it(tmp_path, source, state):
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "README.md").write_text("words")
    assert_gives(tmp_path, source)
    save_weights(source, tmp_path / "open_clip_model.safetensors")  # goes before pickled ones
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert_gives(tmp_path, source)


def test_a_folder_of_several_or_no_weights_asks_for_one(tmp_path, source):
    refused(tmp_path, "holds no weights: expected model.safetensors")
    for name in ("a", "b"):
        save_weights(source, tmp_path / f"{name}.safetensors")
    refused(tmp_path, r"several files of weights \(a\.safetensors, b\.safetensors\): name the one")


def test_a_saved_models_folder_is_weights(tmp_path, source):
    save_model(source, tmp_path)
    assert_gives(tmp_path, source)


def deepspeed_checkpoint(folder: Path, state: dict[str, Tensor]) -> None:
    """What DeepSpeed 0.19 leaves of ZeRO stage 1, less the optimizer's own file."""
    (folder / "epoch_2").mkdir(parents=True)
    content = {
        "module": state,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [{key: value.shape for key, value in state.items()}],
        "ds_config": {"train_batch_size": 2},
        "ds_version": "0.19.8",
        "epoch": 2,
    }
    torch.save(content, folder / "epoch_2/mp_rank_00_model_states.pt")
    (folder / "latest").write_text("epoch_2")


@pytest.mark.parametrize("place", ["", "epoch_2", "epoch_2/mp_rank_00_model_states.pt"])
def test_a_deepspeed_checkpoint_gives_its_module(tmp_path, source, state, place):
    deepspeed_checkpoint(tmp_path / "run", state)
    assert_gives(tmp_path / "run" / place, source)


def test_a_model_parallel_deepspeed_checkpoint_is_refused(tmp_path, state):
    deepspeed_checkpoint(tmp_path, state)
    torch.save({}, tmp_path / "epoch_2/mp_rank_01_model_states.pt")
    refused(tmp_path, "2 model states where one is expected")


def test_a_training_checkpoint_gives_its_parameters_whatever_ranks_wrote_it(
    tmp_path, source, state
):
    write_training_state(tmp_path, state)
    assert_gives(tmp_path, source)
    assert_gives(tmp_path / "step-00000004", source)


def write_training_state(folder: Path, state: dict[str, Tensor]) -> None:
    """Each parameter in two pieces, the later piece first."""
    fragments = []
    for name, value in state.items():
        flat = value.reshape(-1)
        for start, stop in ((len(flat) // 2, len(flat)), (0, len(flat) // 2)):
            if start < stop:
                piece = flat[start:stop].clone()
                tensors = {"param": piece, "exp_avg": torch.full_like(piece, 7.0)}
                fragments.append(StateFragment(name, start, tensors))
    save_checkpoint(folder, fragments, TrainingProgress(4, {}, {}, 1.0, {}), keep=1)


def test_a_training_checkpoint_without_one_shard_is_refused(tmp_path, state):
    write_training_state(tmp_path, state)
    (tmp_path / "step-00000004/shard-0.safetensors").write_bytes(b"")
    refused(tmp_path, r"shard-0\.safetensors cannot be read as weights \(it is empty\)")


class Scripted(nn.Module):
    """What OpenAI's archives are in form: a state dict with half-precision weights and scalars."""

    def __init__(self, source: EvaClip) -> None:
        super().__init__()
        for name, child in source.text.named_children():
            self.add_module(name, child)
        self.positional_embedding = source.text.positional_embedding
        self.text_projection = source.text.text_projection
        self.register_buffer("context_length", torch.tensor(77))

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_a_torchscript_archive_is_opened_only_when_asked(tmp_path):
    source = create_model(DEMO, seed=9)
    path = tmp_path / "ViT-demo.pt"
    torch.jit.save(torch.jit.trace(Scripted(source).half(), torch.zeros(1)), path)
    target = create_model(DEMO, seed=1)
    with pytest.raises(InputError, match="TorchScript archive, which holds code"):
        load_weights(target, path, part="text")
    report = load_weights(target, path, part="text", allow_torchscript=True)
    assert report.layout == "openai"
    assert report.expected_gaps == ("text.text_projection",)
    assert {"context_length", "text_projection"} <= set(report.ignored)
    for key, value in source.text.ln_final.state_dict().items():
        assert torch.equal(target.text.ln_final.state_dict()[key], value.float())


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ({"module": {}, "by": os.system}, "posix.system"),
        ({"module": {}, "by": getattr}, "getattr"),
    ],
)
@pytest.mark.parametrize("is_zip", [True, False])
def test_pickled_classes_are_named_and_never_made(tmp_path, content, named, is_zip):
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=is_zip)
    refused(tmp_path / "w.pt", f"holds objects of {named} besides tensors")


@pytest.mark.parametrize("is_zip", [True, False])
def test_what_training_programs_leave_beside_weights_is_passed_over(
    tmp_path, source, state, is_zip
):
    luggage = {
        "args": argparse.Namespace(lr=np.float64(1e-3)),
        "best": np.float32(0.5),
        "curve": np.arange(3.0),
        "rng": np.random.default_rng(0),
        "where": Path("x"),
        "when": datetime.now(UTC),
        "counts": defaultdict(int, seen=3),
        "optimizer": torch.optim.AdamW,
    }
    content = {"state_dict": state, **luggage}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=is_zip)
    assert_gives(tmp_path / "w.pt", source)


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_pickled_code_does_not_run(tmp_path):
    torch.save({"module": {"logit_scale": Touch(tmp_path / "ran")}}, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "holds objects of")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("name", ["w.safetensors", "zip.pt", "old.pt"])
def test_a_file_that_is_cut_off_is_one_sentence(tmp_path, state, name, share):
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=name == "zip.pt")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    refused(path, "cannot be read as weights")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_a_page_instead_of_weights_is_one_sentence(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")
    refused(tmp_path / name, "cannot be read as weights")


@pytest.mark.parametrize("content", [torch.zeros(3), [torch.zeros(3)], {"epoch": 1}])
def test_a_torch_file_without_names_is_one_sentence(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "holds no tensors with names")


def test_nothing_at_all_is_one_sentence(tmp_path):
    refused(tmp_path / "w.safetensors", "does not exist")


PEAK = """
import re, sys
from pathlib import Path
from evaclip_model.create import create_model

def peak_kib():  # of this program; getrusage would begin with the peak of the one that started it
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

create_model("EVA02-CLIP-demo")
before = peak_kib()
model = create_model({config}, weights=sys.argv[1], precision=sys.argv[2])
print((peak_kib() - before) * 1024 / sum(p.nbytes for p in model.parameters()))
"""
"""Peak memory of making a model from a file, as a share of the model's own bytes."""
LARGE = {
    "embed_dim": 64,
    "vision": {
        "image_px": 32,
        "patch_px": 16,
        "width": 768,
        "layers": 4,
        "heads": 12,
        "mlp_width": 3072,
        "mlp": "gelu",
        "fused_qkv": True,
        "sub_norm": False,
        "norm_placement": "pre",
    },
    "text": {"width": 512, "layers": 2, "heads": 8},
}


@pytest.mark.parametrize(
    ("name", "precision"),
    [("single.safetensors", "fp32"), ("half.pt", "fp32"), ("single.pt", "fp16")],
)
def test_a_model_is_never_in_memory_twice(tmp_path, name, precision):
    model = create_model(LARGE)  # 230 MB
    if name.startswith("half"):
        model.half()
    if name.endswith(".pt"):
        torch.save({"module": model.state_dict()}, tmp_path / name)
    else:
        save_weights(model, tmp_path / name)
    program = PEAK.replace("{config}", repr(LARGE))
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / name), precision],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert 0.9 < float(done.stdout) < 1.2
