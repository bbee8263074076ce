"""The demo recipe with one technique switched off at a time: Table 5 of the paper, in small.

Every row is a whole run on the same shards with the same samples seen, two fifths of the recipe's,
so that five runs fit into a quarter of an hour; figures are of the held-out artist. Prints a
Markdown table. A second run prints what is there.

    make ablation
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from flows.config.recipe import load_recipe
from flows.config.recipe_loader import RECIPES
from flows.graph.graph import load_graph

SET = "emoji-twemoji"
SHARE = 0.4
"""Of the recipe's samples."""
BOTH = ("stage1", "stage2")
ADAMW_LR = 1e-3
ROWS: dict[str, list[str]] = {
    "the recipe": [],
    "no masking": ["train.stage1.patch_dropout=0.0"],
    "AdamW instead of LAMB": [
        f"train.{stage}.{setting}"
        for stage in BOTH
        for setting in (f"optimizer=adamw lr_vision={ADAMW_LR} lr_text={ADAMW_LR}").split()
    ],
    "no layer decay": [
        f"train.{stage}.layer_decay_{tower}=1.0" for stage in BOTH for tower in ("vision", "text")
    ],
    "no stage 2": [],
}
"""Row -> overrides. The last row's recipe has no second training stage at all."""


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        single = Path(scratch) / "demo.toml"
        single.write_text(without_second_stage((RECIPES / "demo.toml").read_text()))
        print("| recipe | top-1 | top-5 | × chance | training |\n|---|---|---|---|---|")
        for title, overrides in ROWS.items():
            recipe = str(single) if title == "no stage 2" else "demo"
            print(row(title, recipe, [*overrides, *shortened(recipe)]), flush=True)


def shortened(recipe: str) -> list[str]:
    """Overrides that shorten every training stage and leave the demo's own model its name."""
    stages = load_recipe(recipe).train
    lengths = [
        f"train.{stage.name}.samples_seen={round(stage.samples_seen * SHARE)}" for stage in stages
    ]
    return [*lengths, "register.model_name=evaclip-ablation"]


def row(title: str, recipe: str, overrides: list[str]) -> str:
    """Run one variant (or find it finished) and render its line."""
    flags = [part for one in overrides for part in ("--set", one)]
    command = [sys.executable, "-m", "flows", "run", "pipeline", recipe, *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    _, _, graph = load_graph(recipe, overrides)
    results = json.loads((graph.evaluate.folder / "results.json").read_text())
    figures, chance = results["results"][SET]["trained"], results["chance"][SET]["top1"]
    seconds = sum(
        json.loads((step.folder / "result.json").read_text())["seconds"] for step in graph.train
    )
    top1, top5 = figures["top1"], figures["top5"]
    shares = f"{100 * top1:.2f} % | {100 * top5:.2f} % | {top1 / chance:.0f}"
    return f"| {title} | {shares} | {seconds:.0f} s |"


def without_second_stage(recipe: str) -> str:
    """The recipe's text less its second [[train]] table."""
    head, first, second = recipe.split("[[train]]")
    return head + "[[train]]" + first + second[second.index("[evaluate]") :]


if __name__ == "__main__":
    main()
