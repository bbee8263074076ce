"""Kill -9 ranks of a training at random moments, go on with as many or other ranks, and compare.

A cell is a number of ranks before and after the first kill, and a precision. Every other kill
strikes while a checkpoint is being written. The end must be that of the uninterrupted run: the same
bits with as many ranks. With others, whose sums have another order, it may be no further away than
TOLERANCE or twice as far as a run that had the other ranks from its first step and was never
killed. Then a long run is killed again and again; what is lost each time are the steps behind the
newest whole checkpoint and no others. Prints Markdown tables and exits with 1 when a row differs.

    make test-train-faults          15 cells and 100 kills, about 15 minutes on two cores
    PYTHONPATH=. python tests/faults/training.py --cells 2-1-bf16 --kills 5 --cycles 0 --seed 3
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from evaclip_model.create import create_model
from evaclip_model.weights.checkpoint_format import list_checkpoints
from evaclip_model.weights.load import save_model
from tests.evaclip_model.conftest import Ranks, write_small_shards
from tests.evaclip_model.trainer_runs import TINY, finish, job_of

SIZES = ((1, 1), (2, 2), (2, 1), (1, 2), (2, 3))
PRECISIONS = ("fp32", "bf16", "fp16")
EVERY = 3
"""Steps between checkpoints."""
TOLERANCE = {"fp32": 2e-4, "bf16": 2e-2, "fp16": 5e-3}
"""Allowed with another number of ranks. One weight alone may differ more: the gradient of a key's
bias is rounding and nothing else, and Adam's and LAMB's rules make steps of any gradient."""
FP16 = Path(__file__).parents[1] / "evaclip_model" / "fp16_on_cpu.py"
OVERFLOWS = {"fp16": 18}
"""Steps until the loss scale fits the tiny model's gradients; kills come later, when it learns."""
PATIENCE_S = 300
START_S = 2.0
"""A kill before the first step comes within so many seconds."""


@dataclass(frozen=True)
class Cell:
    """One row of the matrix."""

    before: int
    after: int
    precision: str

    @property
    def name(self) -> str:
        return f"{self.before}-{self.after}-{self.precision}"


@dataclass
class Kills:
    """What was done to a run."""

    count: int = 0
    in_a_save: int = 0
    """Those that left a checkpoint half written."""
    redone: int = 0
    """Steps that were made again, over all kills."""
    most_redone: int = 0
    wrong: int = 0
    """Times a run did not go on from the newest whole checkpoint, or that was too old."""


class Training:
    """One run of the tiny model, killed and continued."""

    def __init__(
        self, ranks: Ranks, data: Path, folder: Path, precision: str, steps: int, **changes: object
    ) -> None:
        self._ranks, self._precision = ranks, precision
        self._overflows = OVERFLOWS.get(precision, 0)
        self.job = job_of(
            data,
            folder,
            samples_seen=(self._overflows + steps) * 24,
            precision=precision,
            checkpoint_every_steps=EVERY,
            **changes,
        )
        self.kills = Kills()
        self._metrics = folder / "metrics.jsonl"
        self._checkpoints = folder / "checkpoints"

    def to_the_end(self, count: int) -> None:
        finish(self._ranks, self._start(count), self.job)

    def killed(self, count: int, chance: random.Random, *, in_a_save: bool) -> bool:
        """Start `count` ranks and kill some of them; False: they were done before."""
        before, began = self._newest(), time.time()
        pids = self._start(count)
        moment = max(before, self._overflows) + chance.randrange(0, 3 * EVERY)
        if in_a_save:
            struck = self._wait(lambda: self._done(began) >= max(1, moment) and self._is_saving())
        elif moment == before:
            time.sleep(chance.random() * START_S)
            struck = True
        else:
            struck = self._wait(lambda: self._done(began) >= moment)
        if struck:
            # Ranks that have not met yet wait for a dead one until their launcher ends them.
            have_met = self._done(began) > 0
            for victim in chance.sample(pids, chance.randint(1, count) if have_met else count):
                os.kill(victim, signal.SIGKILL)
        codes = self._ranks.wait(pids)
        if codes == [0] * count:
            return False
        assert -signal.SIGKILL in codes, (codes, self._logs())
        self._count(before, began)
        return True

    def losses(self) -> list[float]:
        return [row["loss"] for row in self._rows()]

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.job.parent / "model" / "model.safetensors")

    def _start(self, count: int) -> list[int]:
        worker = ["evaclip_model.training.worker", self.job]
        target = [FP16, *worker] if self._precision == "fp16" else worker
        return self._ranks.start(count, self.job.parent, *target)

    def _done(self, began: float) -> int:
        """Steps of the run that were done when the ranks that began then had made one; else 0."""
        written = self._metrics.read_bytes() if self._metrics.exists() else b""
        # The last whole line alone: all of them, a thousand times a second, would take a core.
        line = written[: written.rfind(b"\n") + 1].rstrip(b"\n").rpartition(b"\n")[2]
        row = json.loads(line) if line else {"time": 0.0}
        return int(row["step"]) if row["time"] >= began else 0

    def _wait(self, is_time) -> bool:
        """Until it is time; False when the run has ended before."""
        deadline = time.monotonic() + PATIENCE_S
        while not is_time():
            if (self.job.parent / "result.json").exists():
                return False
            assert time.monotonic() < deadline, self._logs()
            time.sleep(0.001)
        return True

    def _rows(self) -> list[dict[str, float]]:
        """Whole lines of the metrics."""
        written = self._metrics.read_bytes() if self._metrics.exists() else b""
        return [json.loads(line) for line in written.splitlines(True) if line.endswith(b"\n")]

    def _is_saving(self) -> bool:
        steps = self._checkpoints.glob("step-*")
        return any(not (step / "manifest.json").exists() for step in steps)

    def _newest(self) -> int:
        """Step of the newest checkpoint with a manifest."""
        found = list_checkpoints(self._checkpoints)
        return int(found[0].name.removeprefix("step-")) if found else 0

    def _count(self, before: int, began: float) -> None:
        """Compare what this run did with the checkpoint it should have begun at."""
        kills, newest = self.kills, self._newest()
        rows = self._rows()
        steps = [row["step"] for row in rows if row["time"] >= began]
        if steps and (steps[0] != before + 1 or steps != list(range(before + 1, steps[-1] + 1))):
            kills.wrong += 1
        done = rows[-1]["step"] if rows else 0
        kills.count += 1
        kills.in_a_save += self._is_saving()
        kills.redone += done - newest
        kills.most_redone = max(kills.most_redone, done - newest)
        # The last save may have been under way, the one before it was whole by then.
        if steps and done - newest >= 2 * EVERY:
            kills.wrong += 1

    def _logs(self) -> str:
        return "".join(path.read_text()[-2000:] for path in self.job.parent.glob("rank-*.log"))


def differences(run: Training, reference: Training) -> tuple[float, float]:
    """Largest difference of a step's loss, as a share of it; distance of the weights, as a share of
    their length. Both are 0 for the same bits alone."""
    losses, weights = reference.losses(), reference.weights()
    of_loss = max(
        abs(ours - theirs) / abs(theirs) for ours, theirs in zip(run.losses(), losses, strict=True)
    )
    ours = run.weights()
    apart = sum(float((ours[name] - weights[name]).double().square().sum()) for name in weights)
    length = sum(float(weight.double().square().sum()) for weight in weights.values())
    of_weights = math.sqrt(apart / length)
    return of_loss, of_weights


def play(
    ranks: Ranks,
    data: Path,
    folder: Path,
    cell: Cell,
    reference: Training,
    others: Training,
    *,
    kills: int,
    steps: int,
    chance: random.Random,
) -> bool:
    """One cell; prints its row."""
    run = Training(ranks, data, folder, cell.precision, steps)
    for number in range(kills):
        count = cell.before if number == 0 else cell.after
        if not run.killed(count, chance, in_a_save=number % 2 == 0):
            break
    run.to_the_end(cell.after)
    return row(f"{cell.before} → {cell.after}", cell, run, reference, others)


def row(sizes: str, cell: Cell, run: Training, reference: Training, others: Training) -> bool:
    """Print and judge; `others` has the cell's later ranks from the start, uninterrupted."""
    found = differences(run, reference)
    by_themselves = differences(others, reference)
    if cell.before == cell.after:
        allowed = [0.0, 0.0]
    else:
        allowed = [max(TOLERANCE[cell.precision], 2 * other) for other in by_themselves]
    kills = run.kills
    is_same = all(f <= a for f, a in zip(found, allowed, strict=True)) and not kills.wrong
    print(
        f"| {sizes} | {cell.precision} | {kills.count} | {kills.in_a_save} "
        f"| {kills.redone} ({kills.most_redone}) | {found[0]:.1e} | {found[1]:.1e} "
        f"| {by_themselves[0]:.1e} | {by_themselves[1]:.1e} | {'yes' if is_same else 'NO'} |",
        flush=True,
    )
    return is_same


HEAD = (
    "| ranks | precision | kills | in a save | steps redone (most) | loss | weights "
    "| loss, uninterrupted with the later ranks | weights, likewise | as uninterrupted |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def main(arguments: list[str]) -> int:
    every_cell = [Cell(*sizes, precision) for precision in PRECISIONS for sizes in SIZES]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=3, help="of each cell")
    parser.add_argument("--steps", type=int, default=24, help="of each cell's run")
    parser.add_argument("--cycles", type=int, default=100, help="kills of the long run")
    parser.add_argument("--cells", nargs="*", default=[cell.name for cell in every_cell])
    options = parser.parse_args(arguments)
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="evaclip-training-") as scratch:
        folder = Path(scratch)
        (folder / "data").mkdir()
        data = write_small_shards(folder / "data")
        save_model(create_model(TINY, seed=0), data / "start")
        ranks = Ranks(folder)
        try:
            print(HEAD)
            cells = [cell for cell in every_cell if cell.name in options.cells]
            ends = [matrix_cell(ranks, data, folder, cell, options, chance) for cell in cells]
            ends.append(not options.cycles or cycles(ranks, data, folder, options.cycles, chance))
        finally:
            ranks.close()
    return 0 if all(ends) else 1


def matrix_cell(ranks, data, folder, cell, options, chance) -> bool:
    def uninterrupted(count: int) -> Training:
        at = folder / f"{count}-{cell.precision}"
        run = Training(ranks, data, at, cell.precision, options.steps)
        if not (at / "result.json").exists():
            run.to_the_end(count)
        return run

    reference, others = uninterrupted(cell.before), uninterrupted(cell.after)
    at = folder / cell.name
    figures = {"kills": options.kills, "steps": options.steps}
    is_same = play(ranks, data, at, cell, reference, others, chance=chance, **figures)
    shutil.rmtree(at)
    return is_same


def cycles(ranks: Ranks, data: Path, folder: Path, count: int, chance: random.Random) -> bool:
    """One run of two ranks that is killed `count` times."""
    steps = 6 * count  # a cycle gets 4 steps further, and 3 of them are made again
    reference = Training(ranks, data, folder / "long", "fp32", steps)
    reference.to_the_end(2)
    run = Training(ranks, data, folder / "cycles", "fp32", steps)
    while run.kills.count < count:
        if not run.killed(2, chance, in_a_save=chance.random() < 0.5):
            break
    if not (run.job.parent / "result.json").exists():
        run.to_the_end(2)
    return row("2 → 2", Cell(2, 2, "fp32"), run, reference, reference) and run.kills.count == count


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
