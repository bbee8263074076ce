"""A model of clothes tuned on handwritten digits: the gain, what it forgot, and what the gate says.

Debian's `dataset-fashion-mnist` makes the champion; scikit-learn's digits, which come with MLflow,
are the new pictures. It is tuned twice by one recipe, without and with `[interpolate]`. Weights are
chosen on pictures that are neither trained on nor judged by.

    apt-get install dataset-fashion-mnist
    make finetune
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits

from flows.graph.graph import load_graph
from tasks.evaluate.config import RESULTS
from tasks.evaluate.sets.convert.shard_writer import Found, Source, write_set
from tasks.register.config import DECISION
from tests.benchmarks import acceptance
from tests.benchmarks.acceptance import CLASSES, DATA, FASHION, TEMPLATES, png

WORK = Path("runs/finetune").absolute()
DIGITS = tuple(
    f"the digit {word}"
    for word in ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
)
TRAINED = 20_000
"""Pictures of clothes; the champion is no better than it must be."""
BOUNDS = {"train": (0, 1000), "held": (1000, 1400), "test": (1400, 1797)}
"""Digits that are trained on, chosen on, judged by."""
SETS = ("digits", "fashion", "digits-held", "fashion-held")
LEARNT, KEPT = "digits.top1", "fashion.top1"
INTERPOLATED = (
    'interpolate={choose_on=["digits-held"], keep_on=["fashion-held"],'
    " max_loss_points=0.2, weights=[0, 0.2, 0.3, 0.4, 0.5, 0.7, 1]}"
)


def main() -> None:
    if not FASHION.is_dir():
        sys.exit(f"{FASHION} is missing: apt-get install dataset-fashion-mnist")
    WORK.mkdir(parents=True, exist_ok=True)
    acceptance.WORK = WORK
    os.chdir(WORK)
    os.environ["EVACLIP_ROOT"] = str(WORK / "runs")
    for name in ("fashion.json", "clothes.toml", "digits.toml"):
        shutil.copy(DATA / name, WORK / name)
    write_data()
    rows = [run_recipe("the champion, on clothes", "clothes.toml")]
    rows.append(run_recipe("tuned on digits", "digits.toml"))
    rows.append(run_recipe("tuned, between start and end", "digits.toml", INTERPOLATED))
    print("| | digits, top-1 | clothes, top-1 | gate |\n|---|---|---|---|")
    for what, learnt, kept, decision in rows:
        print(f"| {what} | {learnt} | {kept} | {decision} |")
    outcomes = [decision.partition(":")[0] for *_, decision in rows]
    if outcomes != ["PROMOTE", "REJECT", "PROMOTE"]:
        sys.exit("expected that the gate rejects what forgot and promotes the other")


def write_data() -> None:
    """Training pictures as parquet, and four evaluation sets."""
    clothes, labels = acceptance.read_images("train"), acceptance.read_labels("train").tolist()
    write_pairs("clothes", clothes[:TRAINED], [CLASSES[label] for label in labels[:TRAINED]])
    tests = acceptance.read_images("t10k"), acceptance.read_labels("t10k").tolist()
    found = load_digits()
    digits, of_digits = list(map(enlarge_digit, found.images)), found.target.tolist()
    first, last = BOUNDS["train"]
    write_pairs("digits", digits[first:last], [DIGITS[label] for label in of_digits[first:last]])
    for name, (pictures, answers), classes, (first, last) in (
        ("digits", (digits, of_digits), DIGITS, BOUNDS["test"]),
        ("digits-held", (digits, of_digits), DIGITS, BOUNDS["held"]),
        ("fashion", tests, CLASSES, (0, 5000)),
        ("fashion-held", tests, CLASSES, (5000, 7000)),
    ):
        sources = [
            Source(str(number), partial(find_picture, pictures[number], answers[number]))
            for number in range(first, last)
        ]
        write_set(
            WORK / "sets" / name,
            sources,
            kind="classification",
            plan=name,
            classnames=classes,
            templates=TEMPLATES,
        )


def find_picture(picture: np.ndarray, label: int) -> Found:
    return Found(png(picture), "png", label)


def enlarge_digit(digit: np.ndarray) -> np.ndarray:
    """[8, 8] from 0 to 16 -> [28, 28] uint8."""
    image = Image.fromarray((digit * 255 / 16).astype(np.uint8))
    return np.asarray(image.resize((28, 28), Image.Resampling.BICUBIC))


def write_pairs(name: str, pictures: Iterable[np.ndarray], captions: Sequence[str]) -> None:
    table = pa.table({"image": [png(picture) for picture in pictures], "caption": captions})
    pq.write_table(table, WORK / f"{name}.parquet")


def run_recipe(what: str, recipe: str, *overrides: str) -> tuple[str, str, str, str]:
    """Run the pipeline; the row of its model: its gains over its beginning, the gate's word."""
    changes = [part for one in overrides for part in ("--set", one)]
    command = [sys.executable, "-m", "flows", "run", "pipeline", recipe, *changes]
    subprocess.run(command, check=True, cwd=WORK, env=acceptance.environment())
    _, _, graph = load_graph(recipe, overrides)
    decided, evaluated = graph.register.folder / DECISION, graph.evaluate.folder / RESULTS
    decision = json.loads(decided.read_text())
    results = json.loads(evaluated.read_text())
    deciding = [one for one in decision["reasons"] if one["outcome"] == decision["outcome"]]
    says = f"{decision['outcome'].upper()}: {deciding[-1]['says']}"
    return what, describe_gain(results, LEARNT), describe_gain(results, KEPT), says


def describe_gain(results: dict, name: str) -> str:
    """A figure in percent, and its paired difference to the beginning's with 95 % interval."""
    evalset, _, metric = name.partition(".")
    figure = results["results"][evalset][results["subject"]][metric]
    (pair,) = (by_metric[metric] for by_metric in results["paired"][evalset].values())
    low, high = (100 * end for end in pair["interval"])
    return f"{100 * figure:.2f} ({100 * pair['difference']:+.2f}, {low:+.2f} to {high:+.2f})"


if __name__ == "__main__":
    main()
