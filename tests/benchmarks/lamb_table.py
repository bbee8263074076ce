"""LAMB under ZeRO beside plain LAMB per parameter in one process, as a Markdown table.

Figures: after the last step, the largest relative difference of any parameter's fp32 master (norm
of the difference over norm of the value); over all steps, the largest of the loss. The network is
small and of odd sizes, so that ranks cut through its parameters.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tests.evaclip_model.conftest import Ranks

RANK = Path(__file__).parents[1] / "evaclip_model"
Run = Mapping[str, Tensor]
NAIVE = {"lamb": {"trust_scope": "partition"}}


def runner(ranks: Ranks, folder: Path, common: Mapping[str, Any]) -> Callable[..., Run]:
    """A function that trains the small network: engine, ranks, settings -> weights, figures."""

    def run(engine: str, count: int = 1, **options: Any) -> Run:
        place = folder / str(len(list(folder.iterdir())))
        place.mkdir()
        script = [RANK / "step_worker.py"]
        if options.get("precision") == "fp16":
            script.insert(0, RANK / "fp16_on_cpu.py")
        settings = json.dumps({**common, **options})
        ranks.run(count, place, *script, place / "out", engine, settings)
        found: Run = load_file(place / "out")
        return found

    return run


def differences(run: Run, reference: Run) -> tuple[float, float]:
    """Of the weights, and of the losses, relative."""
    weights = max(
        ((run[name] - value).norm() / value.norm()).item()
        for name, value in reference.items()
        if name.startswith("param.")
    )
    losses = (run["losses"] - reference["losses"]).abs() / reference["losses"]
    return weights, losses.max().item()


def rows(run: Callable[..., Run]) -> list[tuple[str, float, float]]:
    """Label and differences of every row of the table."""
    plain = run("torch")
    clipped = run("torch", grad_clip_norm=0.1)
    naive = {count: run("deepspeed", count, **NAIVE) for count in (1, 2)}
    table = [
        (f"a ratio for each slice, ZeRO-1, W = {count}", *differences(naive[count], plain))
        for count in naive
    ]
    table.append(("the same, W = 2 against W = 1", *differences(naive[2], naive[1])))
    for stage, counts in ((1, (1, 2, 3, 5)), (2, (1, 2, 3)), (0, (1, 2, 3))):
        table += [
            (
                f"a ratio for each parameter, ZeRO-{stage}, W = {count}",
                *differences(run("deepspeed", count, zero_stage=stage), plain),
            )
            for count in counts
        ]
    table.append(
        (
            "ZeRO-1, W = 3, gradients clipped at 0.1",
            *differences(run("deepspeed", 3, grad_clip_norm=0.1), clipped),
        )
    )
    for stage in (0, 1, 2):
        found = run("deepspeed", 2, zero_stage=stage, parts=3)
        table.append((f"ZeRO-{stage}, W = 2, in 3 parts", *differences(found, plain)))
    for precision in ("bf16", "fp16"):
        for stage in (0, 1, 2):
            for parts in (1, 3):
                options = {"precision": precision, "zero_stage": stage, "parts": parts}
                found = run("deepspeed", 2, **options)
                label = f"{precision}, ZeRO-{stage}, W = 2" + (", in 3 parts" if parts > 1 else "")
                table.append((label, *differences(found, plain)))
    table.append(("bf16, plain torch", *differences(run("torch", precision="bf16"), plain)))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps, at most 20")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate of every tower")
    given = parser.parse_args()
    rates = {"lr_vision": given.lr, "lr_text": given.lr, "lr_other": given.lr}
    common = {"steps": given.steps, "grad_clip_norm": None, **rates}
    with tempfile.TemporaryDirectory() as folder:
        ranks = Ranks(Path(folder))
        try:
            runs = Path(folder) / "runs"
            runs.mkdir()
            found = rows(runner(ranks, runs, common))
        finally:
            ranks.close()
    print(f"{given.steps} steps, reference: plain LAMB per parameter in fp32, one process\n")
    print("| run | largest weight difference | largest loss difference |\n|---|---|---|")
    for label, weights, losses in found:
        print(f"| {label} | {weights:.1e} | {losses:.1e} |")


if __name__ == "__main__":
    main()
