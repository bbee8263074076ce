"""Files of strangers that claim more than they hold: one sentence, and no memory taken for it."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evaclip_model import InputError, create_model, load_weights, open_model, save_model
from evaclip_model.model.model_config import ModelConfig
from evaclip_model.weights.checkpoint_files import open_tensors
from evaclip_model.zeroshot.encode_chunks import image_files
from evaclip_model.zeroshot.set_layout import read_lines


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(create_model("EVA02-CLIP-demo", seed=0), folder)
    return folder


@pytest.mark.parametrize(
    ("tower", "claims"),
    [
        ("vision", {"image_px": 64_000}),
        ("vision", {"width": 64_000, "heads": 1000}),
        ("vision", {"mlp_width": 10**9}),
        ("vision", {"layers": 10**9}),
        ("text", {"vocab_size": 10**9}),
        ("text", {"context_length": 10**9}),
    ],
)
def test_a_config_is_held_against_its_weights(
    saved: Path, tmp_path: Path, tower: str, claims: dict[str, Any]
) -> None:
    shutil.copytree(saved, tmp_path / "model")
    config = json.loads((saved / "config.json").read_text())
    config[tower] |= claims
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"claims more than .* holds"):
        open_model(tmp_path / "model")


def test_nested_brackets_are_no_config_and_no_index(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("[" * 200_000)
    with pytest.raises(InputError, match="cannot be read as a model config"):
        open_model(tmp_path / "model")
    index = tmp_path / "a.safetensors.index.json"
    index.write_text('{"weight_map":' + '{"a":' * 100_000 + "1" + "}" * 100_001)
    with pytest.raises(InputError, match="is not the index"):
        load_weights(create_model("EVA02-CLIP-demo", seed=0), index)


def test_a_tensor_is_held_against_its_storage_and_an_archive_against_its_size(
    tmp_path: Path,
) -> None:
    model = create_model("EVA02-CLIP-demo", seed=0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    width = state["visual.pos_embed"].shape[2]
    state["visual.pos_embed"] = torch.zeros(1, 1, width).expand(1, 1 + 1000**2, width)
    torch.save(state, tmp_path / "expanded.pt")
    with pytest.raises(InputError, match="claims a tensor of 1 x 1000001"):
        load_weights(model, tmp_path / "expanded.pt")
    torch.save({"a": torch.zeros(1 << 22)}, tmp_path / "zeros.pt")
    with (
        zipfile.ZipFile(tmp_path / "zeros.pt") as plain,
        zipfile.ZipFile(tmp_path / "deflated.pt", "w", zipfile.ZIP_DEFLATED) as deflated,
    ):
        for member in plain.namelist():
            deflated.writestr(member, plain.read(member))
    with pytest.raises(InputError, match="compressed far beyond"):
        load_weights(model, tmp_path / "deflated.pt")


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("x.safetensors", lambda file: open_tensors(file, shapes={})),
        ("x.index.json", lambda file: open_tensors(file, shapes={})),
        ("x.json", ModelConfig.load),
        ("x.txt", lambda file: read_lines(file, "names")),
        ("x.jpg", image_files),
        ("x.jpg", lambda file: image_files(file.parent)),
    ],
)
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str, use: Callable[[Path], Any]) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=f"{name} is a pipe, not a file"):
        use(tmp_path / name)
