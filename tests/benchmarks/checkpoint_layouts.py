"""Every checkpoint layout tried with small models: what each file gave, as a table.

    PYTHONPATH=. python tests/benchmarks/checkpoint_layouts.py

Covers: files in the layouts and wrappings that EVA-CLIP's, EVA's, OpenAI's, open_clip's, timm's and
transformers' published weights have, the libraries' own models where they are the source; "values"
says whether each loaded weight is bit by bit what was put into the file.
Not here: files that must be refused, and memory (tests/evaclip_model/test_layout_files.py).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from evaclip_model.create import create_model
from evaclip_model.model.clip import EvaClip
from evaclip_model.model.model_config import ModelConfig
from evaclip_model.training.checkpoint.save_and_load import save_checkpoint
from evaclip_model.training.engine.engine import StateFragment
from evaclip_model.weights.checkpoint_format import TrainingProgress
from evaclip_model.weights.load import LoadReport, Part, load_weights, save_model
from tests.evaclip_model.peer_libraries import transformers
from tests.evaclip_model.peers import FAMILIES, randomise, twin_of

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A file of one layout, and the tower it is loaded into."""

    title: str
    family: str
    write: Callable[[EvaClip, Path], Path]
    """Writes a model's weights into a folder; returns what to load."""
    part: Part = "all"
    image_px: int | None = None
    """Side of the loading model's images; none = the writing model's."""
    is_script: bool = False
    is_half: bool = False


def rope_tables(model: EvaClip) -> dict[str, Tensor]:
    """The buffers that published files hold and nobody should load; in a wrong shape."""
    if model.config.vision.rope_reference_grid is None:
        return {}
    owners = ["rope", *(f"blocks.{i}.attn.rope" for i in range(model.config.vision.layers))]
    return {
        f"{name}.freqs_{f}": torch.full((4, 4, 8), 9.0) for name in owners for f in ("cos", "sin")
    }


def state_of(model: EvaClip) -> dict[str, Tensor]:
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    return state | {"logit_scale": state["logit_scale"].squeeze(0)}


def released(model: EvaClip) -> dict[str, Tensor]:
    tables = {f"visual.{key}": value for key, value in rope_tables(model).items()}
    return state_of(model) | tables


def old_form(model: EvaClip) -> dict[str, Tensor]:
    return {key.removeprefix("text."): value for key, value in released(model).items()}


def pretraining(model: EvaClip) -> dict[str, Tensor]:
    lacking = ("head.", "inner_attn_ln.")
    tower = {
        k: v for k, v in tower_of(model, "visual.").items() if not any(x in k for x in lacking)
    }
    width = model.config.vision.width
    extra = {"mask_token": torch.zeros(1, 1, width), "lm_head.weight": torch.zeros(20, width)}
    return tower | extra | rope_tables(model)


def tower_of(model: EvaClip, prefix: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): value
        for key, value in state_of(model).items()
        if key.startswith(prefix)
    }


def openai(model: EvaClip) -> dict[str, Tensor]:
    """Text tower and an image tower of another architecture."""
    others = {"visual.class_embedding": torch.zeros(40), "visual.proj": torch.zeros(40, 48)}
    return tower_of(model, "text.") | others | {"logit_scale": torch.tensor(4.6)}


def open_clip_state(model: EvaClip) -> State:
    """The library's own model around timm's tower, filled from ours."""
    state: State = twin_of(model).state_dict()
    return state


def timm_trunk(model: EvaClip) -> State:
    prefix = "visual.trunk."
    twin = open_clip_state(model)
    return {k.removeprefix(prefix): v for k, v in twin.items() if k.startswith(prefix)}


def of_transformers(model: EvaClip) -> State:
    """The library's own CLIP, its text tower filled from ours."""
    text, ours = model.config.text, state_of(model)
    sizes = {"num_hidden_layers": text.layers, "num_attention_heads": text.heads}
    config = transformers.CLIPConfig(
        text_config={
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "intermediate_size": 4 * text.width,
            "max_position_embeddings": text.context_length,
            **sizes,
        },
        vision_config={"hidden_size": 64, "intermediate_size": 64, "image_size": 32, **sizes},
        projection_dim=model.config.embed_dim,
    )
    theirs = transformers.CLIPModel(config)
    state = theirs.state_dict()
    fill = transformers_text(ours, text.layers)
    for key, value in fill.items():
        state[key].copy_(value)
    return state


def transformers_text(ours: State, layers: int) -> dict[str, Tensor]:
    found = {
        "text_model.embeddings.token_embedding.weight": ours["text.token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": ours["text.positional_embedding"],
        "text_projection.weight": ours["text.text_projection"].t(),
    }
    pairs = {
        "attn.out_proj": "self_attn.out_proj",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for leaf in ("weight", "bias"):
        found[f"text_model.final_layer_norm.{leaf}"] = ours[f"text.ln_final.{leaf}"]
        for i in range(layers):
            here, there = f"text.transformer.resblocks.{i}.", f"text_model.encoder.layers.{i}."
            for name, other in pairs.items():
                found[f"{there}{other}.{leaf}"] = ours[f"{here}{name}.{leaf}"]
            joined = ours[f"{here}attn.in_proj_{leaf}"].chunk(3)
            for name, value in zip("qkv", joined, strict=True):
                found[f"{there}self_attn.{name}_proj.{leaf}"] = value
    return found


def torch_file(
    state: Callable[[EvaClip], State], wrapper: str | None = None, prefix: str = ""
) -> Callable[[EvaClip, Path], Path]:
    def write(model: EvaClip, folder: Path) -> Path:
        content = {prefix + key: value for key, value in state(model).items()}
        path = folder / "weights.pt"
        torch.save(content if wrapper is None else {wrapper: content, "epoch": 3}, path)
        return path

    return write


def safetensors_file(state: Callable[[EvaClip], State]) -> Callable[[EvaClip, Path], Path]:
    def write(model: EvaClip, folder: Path) -> Path:
        path = folder / "weights.safetensors"
        save_file({key: value.contiguous() for key, value in state(model).items()}, path)
        return path

    return write


def sharded(model: EvaClip, folder: Path) -> Path:
    state, places = released(model), {}
    for number in range(3):
        name = f"pytorch_model-0000{number + 1}-of-00003.bin"
        shard = {key: state[key] for key in list(state)[number::3]}
        torch.save(shard, folder / name)
        places |= dict.fromkeys(shard, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def deepspeed(model: EvaClip, folder: Path) -> Path:
    (folder / "epoch_7").mkdir()
    content = {"module": released(model), "ds_version": "0.19.8", "optimizer": None}
    torch.save(content, folder / "epoch_7/mp_rank_00_model_states.pt")
    (folder / "latest").write_text("epoch_7")
    return folder


def training(model: EvaClip, folder: Path) -> Path:
    flat = {key: value.detach().reshape(-1).clone() for key, value in model.named_parameters()}
    pieces = [StateFragment(key, 0, {"param": value}) for key, value in flat.items()]
    save_checkpoint(folder, pieces, TrainingProgress(1, {}, {}, 1.0, {}), keep=1)
    return folder


def saved(model: EvaClip, folder: Path) -> Path:
    save_model(model, folder)
    return folder


class _Archive(nn.Module):
    """OpenAI's state dict as a module that can be traced."""

    def __init__(self, state: State) -> None:
        super().__init__()
        for key, value in state.items():
            *modules, name = key.split(".")
            place: nn.Module = self
            for module in modules:
                if not hasattr(place, module):
                    place.add_module(module, nn.Module())
                place = getattr(place, module)
            place.register_buffer(name, value)
        self.register_buffer("input_resolution", torch.tensor(224))

    def forward(self, x: Tensor) -> Tensor:
        return x


def torchscript(model: EvaClip, folder: Path) -> Path:
    path = folder / "ViT.pt"
    torch.jit.save(torch.jit.trace(_Archive(openai(model)), torch.zeros(1)), path)
    return path


E, L, B, G = "EVA02-CLIP-E", "EVA02-CLIP-L", "EVA02-CLIP-B", "EVA01-CLIP-g"
MIM = torch_file(pretraining, "module")
HF_BIN, HF_SAFE = torch_file(of_transformers), safetensors_file(of_transformers)
PEER = torch_file(open_clip_state)
CASES = [
    *(
        Case("released EVA-CLIP, .pt", name, torch_file(released), is_half=True)
        for name in FAMILIES
    ),
    Case("released EVA-CLIP, larger images", L, torch_file(released), image_px=84),
    Case("released EVA-CLIP, safetensors", L, safetensors_file(released)),
    Case("released EVA-CLIP, one tower", L, torch_file(released), "vision"),
    Case("`state_dict` with `module.`", E, torch_file(released, "state_dict", "module.")),
    Case("EVA-CLIP's old form, text unprefixed", B, torch_file(old_form)),
    Case("sharded, .bin with an index", B, sharded),
    Case("DeepSpeed folder", L, deepspeed),
    Case("this package's training checkpoint", L, training),
    Case("this package's saved model", E, saved),
    Case("EVA-01 pretraining, `model`", G, torch_file(pretraining, "model"), "vision"),
    Case("EVA-02 pretraining, `module`", L, MIM, "vision"),
    Case("EVA-02 pretraining, larger images", L, MIM, "vision", image_px=84),
    Case("EVA-02-E pretraining", E, MIM, "vision"),
    Case("OpenAI, TorchScript", L, torchscript, "text", is_script=True, is_half=True),
    Case("OpenCLIP native, .bin", E, torch_file(openai), "text"),
    Case("transformers CLIP, .bin", L, HF_BIN, "text"),
    Case("transformers CLIP, safetensors", E, HF_SAFE, "text"),
    *(Case("open_clip with timm's tower", name, PEER) for name in FAMILIES),
    Case("timm Eva", L, safetensors_file(timm_trunk), "vision"),
    Case("timm Eva", E, safetensors_file(timm_trunk), "vision"),
]


def tried(case: Case) -> tuple[LoadReport, bool]:
    """The report, and whether every weight it calls loaded has the value that was written."""
    source = randomise(create_model(FAMILIES[case.family]))
    if case.is_half:
        source = source.half()
    config: ModelConfig = source.config
    target = create_model(config if case.image_px is None else config.at_image_px(case.image_px))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = case.write(source, Path(folder))
        report = load_weights(target, path, part=case.part, allow_torchscript=case.is_script)
    given, taken = source.state_dict(), target.state_dict()
    return report, all(torch.equal(taken[key], given[key].float()) for key in report.loaded)


def main() -> None:
    print("| file | model | part | layout | loaded | resized | expected gaps | ignored | values |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case in CASES:
        report, is_equal = tried(case)
        counts = (report.loaded, report.resized, report.expected_gaps, report.ignored)
        row = [case.title, case.family, case.part, report.layout, *(str(len(c)) for c in counts)]
        print("| " + " | ".join([*row, "equal" if is_equal else "DIFFERENT"]) + " |")


if __name__ == "__main__":
    main()
