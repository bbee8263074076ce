"""docs/finetune.md: its recipe is run with its five values, its loop as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evaclip_model.create import create_model, open_model
from evaclip_model.weights.load import save_model
from flows.config.profile import Profile
from flows.config.recipe import load_recipe
from flows.graph.graph import draw_graph
from tasks.artifacts.artifact import Artifact
from tasks.progress import report_nothing
from tests.flows.command import environment
from tests.tasks.adopt.test_adopt import write_pictures

PAGE = Path(__file__).parents[1] / "docs" / "finetune.md"
START = Path("start")
SMALL = [
    "initialise.model=EVA02-CLIP-demo",
    "initialise.image_px=32",
    "train.tune.image_px=32",
    "train.tune.global_batch=8",
    "train.tune.lanes=4",
    "train.tune.warmup_steps=1",
    'train.tune.freeze=["vision.patch_embed", "vision.blocks.0-1", "text.token_embedding"]',
]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Artifact]]:
    """Where everything lies, and kind -> artifact of the recipe's steps up to the trained model."""
    folder = tmp_path_factory.mktemp("finetune")
    write_pictures(folder / "photos", range(20))
    lines = [f"{number}.jpg,a photo of {number}" for number in range(20)]
    (folder / "photos/list.csv").write_text("image,says\n" + "\n".join(lines) + "\n")
    config = create_model("EVA02-CLIP-demo", seed=0).config.at_image_px(32)
    save_model(create_model(config, seed=5), folder / START)
    yours = [
        f"adopt.sources.mine.files={folder}/photos/list.csv",
        "adopt.sources.mine.caption=says",
        f"initialise.clip={folder / START}",
        "train.tune.samples_seen=16",
        "register.model_name=my-photos",
    ]
    graph = draw_graph(load_recipe("finetune", [*yours, *SMALL]), folder / "runs", "sqlite:///none")
    graph.require_runnable("train")
    profile = Profile(root=folder / "runs")
    steps = (*graph.data_steps, *graph.model_steps)
    return folder, {s.stage.name: s.make_artifact(profile, report_nothing) for s in steps}


def test_the_recipe_tunes_a_saved_model_on_a_table_with_five_values(
    tuned: tuple[Path, dict[str, Artifact]],
) -> None:
    folder, made = tuned
    assert made["dataset"].counts["samples"] == 20
    before = open_model(folder / START).state_dict()
    after = open_model(made["train"].folder / "model").state_dict()
    kept = {name for name, value in after.items() if torch.equal(value, before[name])}
    frozen = ("visual.patch_embed.", "visual.blocks.0.", "visual.blocks.1.", "text.token_embedding")
    assert {name for name in after if name.startswith(frozen)} <= kept
    assert "visual.blocks.2.mlp.w1.weight" not in kept
    assert "text.transformer.resblocks.0.mlp.c_fc.weight" not in kept


def test_the_loop_of_the_page_trains_on_the_dataset_version(
    tuned: tuple[Path, dict[str, Artifact]],
) -> None:
    folder, made = tuned
    [loop] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(loop.splitlines()) <= 42
    dataset = made["dataset"].folder / "shards.json"
    for theirs, ours in (
        ("models/start", str(folder / START)),
        ("runs/dataset/DIGEST/shards.json", str(dataset)),
        ("models/tuned", str(folder / "tuned")),
        ("BATCH, EPOCHS = 256, 3", "BATCH, EPOCHS = 8, 2"),
    ):
        assert theirs in loop
        loop = loop.replace(theirs, ours)
    ended = subprocess.run(
        [sys.executable, "-c", loop], capture_output=True, text=True, env=environment(folder)
    )
    assert ended.returncode == 0, ended.stderr
    assert re.findall(r"epoch (\d): loss \d+\.\d{3}\n", ended.stdout) == ["0", "1"]
    before, after = open_model(folder / START), open_model(folder / "tuned")
    assert torch.equal(after.visual.patch_embed.proj.weight, before.visual.patch_embed.proj.weight)
    assert not torch.equal(after.visual.head.weight, before.visual.head.weight)
