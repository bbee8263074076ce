"""Noise with known truth: what `keep_share` finds of it, and what that is worth.

Debian's Fashion-MNIST with 40 % of the captions shuffled, and the demo's web with 30 %. A model is
trained on all of it; its own scores choose the share that is right; another one is trained from the
beginning on that choice, with as many samples seen and so as many CPU minutes. Three seeds of
noise, weights and order; intervals are Student's over them.

    apt-get install dataset-fashion-mnist
    make bench-noise                # IMAGES=6000 SAMPLES=30208 for a tenth of it
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from evaclip_model.training.config import MODEL_FOLDER
from flows.graph.graph import load_graph
from tasks.artifacts.artifact import Role
from tasks.dataset.config import LEFT_OUT
from tasks.demo.config import DemoConfig
from tasks.demo.demo import URL_COLUMNS, write_metadata
from tasks.evaluate.config import RESULTS
from tasks.evaluate.sets.convert.shard_writer import Found, Source, write_set
from tasks.index.sample_index import SampleIndex
from tests.benchmarks import acceptance
from tests.benchmarks.acceptance import CLASSES, DATA, FASHION, TEMPLATES, cpu_of_children, png

WORK = Path("runs/noise").absolute()
SHARE = {"fashion": 0.4, "demo": 0.3}
"""Of the captions that are dealt out anew."""
EVALSET = {"fashion": "fashion", "demo": "emoji-twemoji"}
STAGES = ("stage1", "stage2")
HERE = {"PYTHONPATH": str(acceptance.CHECKOUT), "OMP_NUM_THREADS": "1"}
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
"""Numbers of seeds -> quantile of 97.5 % with one degree of freedom less."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--samples", type=int, default=120_064, help="seen in a training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--worlds", nargs="+", choices=tuple(SHARE), default=tuple(SHARE))
    options = parser.parse_args()
    if "fashion" in options.worlds and not FASHION.is_dir():
        sys.exit(f"{FASHION} is missing: apt-get install dataset-fashion-mnist")
    WORK.mkdir(parents=True, exist_ok=True)
    os.chdir(WORK)
    os.environ["EVACLIP_ROOT"] = str(WORK / "runs")
    for world in options.worlds:
        prepare = prepare_fashion if world == "fashion" else prepare_demo
        rows = [measure(world, seed, *prepare(seed, options)) for seed in range(options.seeds)]
        names = ("precision", "recall", "top-1, %: all", "the choice", "gain")
        names += ("CPU minutes: all", "the choice, embedding too")
        print(f"\n{world}, {SHARE[world]:.0%} of the captions dealt out anew, {options}:\n")
        print("| | mean | 95 % interval | seeds |\n|---|---|---|---|")
        for name, values in zip(names, zip(*rows, strict=True), strict=True):
            half = STUDENT.get(len(values), 2.0) * stdev(values) / len(values) ** 0.5
            shown = ", ".join(f"{value:.4g}" for value in values)
            between = f"{mean(values) - half:.4g} to {mean(values) + half:.4g}"
            print(f"| {name} | {mean(values):.4g} | {between} | {shown} |", flush=True)


def measure(
    world: str, seed: int, recipe: str, changes: list[str], wrong: set[str], key: str
) -> tuple[float, ...]:
    """Precision and recall of what was left out, both top-1 in percent, their difference, and the
    CPU minutes of the run without a choice and of the one with it, which includes embedding."""
    before, model = run_recipe(recipe, changes)
    data = load_graph(recipe, changes)[2].dataset.inputs[Role.DATA].folder
    chunks = SampleIndex(data).iterate_chunks(key)
    keys = [value for table in chunks for value in table[key].to_pylist()]
    there = wrong & set(keys)
    rule = [f"embed.models=['{model}']", f"dataset.keep_share={1 - len(there) / len(keys):.6f}"]
    minutes, _ = run_recipe(recipe, [*changes, *rule])
    chosen = load_graph(recipe, [*changes, *rule])[2].dataset
    left = pq.read_table(chosen.folder / LEFT_OUT).to_pylist()
    found = {keys[one["row"]] for one in left if one["reason"] == "low_score"}
    precision, recall = len(found & there) / len(found), len(found & there) / len(there)
    without, with_it = top1(world, recipe, changes), top1(world, recipe, [*changes, *rule])
    return precision, recall, without, with_it, with_it - without, before, minutes


def prepare_fashion(seed: int, options: argparse.Namespace) -> tuple[str, list[str], set[str], str]:
    """(recipe, changes, SHA-256 of pictures with a wrong caption, column of the index)."""
    for name in ("fashion.json", "noise.toml"):
        shutil.copy(DATA / name, WORK / name)
    if not (WORK / "sets" / "fashion").is_dir():
        labels = acceptance.read_labels("t10k").tolist()
        tests = enumerate(zip(acceptance.read_images("t10k"), labels, strict=True))
        sources = [Source(str(number), partial(find_picture, *pair)) for number, pair in tests]
        classes = {"classnames": CLASSES, "templates": TEMPLATES}
        write_set(
            WORK / "sets" / "fashion", sources, kind="classification", plan="noise", **classes
        )
    pictures = [png(picture) for picture in acceptance.read_images("train")[: options.images]]
    labels = acceptance.read_labels("train")[: options.images].tolist()
    dealt = deal_anew(labels, SHARE["fashion"], seed)
    table = pa.table({"image": pictures, "caption": [CLASSES[label] for label in dealt]})
    pq.write_table(table, WORK / f"clothes-{seed}.parquet")
    triples = zip(pictures, labels, dealt, strict=True)
    wrong = {sha256(one).hexdigest() for one, label, other in triples if label != other}
    changes = [f"adopt.sources.pictures.files={WORK}/clothes-{seed}.parquet"]
    changes.append(f"train.train.samples_seen={options.samples}")
    return (
        "noise.toml",
        [*changes, f"initialise.seed={seed}", f"train.train.seed={seed}"],
        wrong,
        "stored_sha256",
    )


def prepare_demo(seed: int, options: argparse.Namespace) -> tuple[str, list[str], set[str], str]:
    """The same of the demo's web, by URL."""
    changes, wrong = [f"initialise.seed={seed}"], set[str]()
    changes += [f"train.{stage}.seed={seed * 8192 + place}" for place, stage in enumerate(STAGES)]
    for source, caption in (("laion2b", "TEXT"), ("coyo700m", "text")):
        folder = WORK / "web" / str(seed) / source
        for file in write_metadata(source, DemoConfig().port, folder)[0]:
            table = pq.read_table(file)
            captions, urls = (table[name].to_pylist() for name in (caption, URL_COLUMNS[source]))
            dealt = deal_anew(captions, SHARE["demo"], seed)
            at = table.column_names.index(caption)
            pq.write_table(table.set_column(at, caption, pa.array(dealt)), file)
            wrong |= {u for u, a, b in zip(urls, captions, dealt, strict=True) if a != b}
        changes.append(f"merge.sources.{source}.files={folder}/*.parquet")
    return "demo", changes, wrong, "url"


def deal_anew(captions: Sequence[Any], share: float, seed: int) -> list[Any]:
    """The captions, a share of them dealt out anew among their pictures."""
    draw, dealt = np.random.default_rng(seed), list(captions)
    places = draw.choice(len(dealt), int(share * len(dealt)), replace=False)
    for place, other in zip(places, draw.permutation(places), strict=True):
        dealt[place] = captions[other]
    return dealt


def find_picture(picture: np.ndarray, label: int) -> Found:
    return Found(png(picture), "png", label)


def run_recipe(recipe: str, changes: Sequence[str]) -> tuple[float, Path]:
    """Run the pipeline: the CPU minutes that it took, and the model."""
    sets = [part for change in changes for part in ("--set", change)]
    before = cpu_of_children()
    words = [sys.executable, "-m", "flows", "run", "pipeline", recipe, *sets]
    ended = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **HERE})
    if ended.returncode:
        sys.exit(f"{' '.join(words)}:\n{ended.stdout}\n{ended.stderr}")
    graph = load_graph(recipe, changes)[2]
    minutes = (cpu_of_children() - before) / 60
    print(f"{recipe} {changes[-1]}: {minutes:.1f} CPU minutes", flush=True)
    return minutes, graph.final.folder / MODEL_FOLDER


def top1(world: str, recipe: str, changes: Sequence[str]) -> float:
    """Of the trained model, in percent."""
    evaluated = load_graph(recipe, changes)[2].evaluate.folder
    results = json.loads((evaluated / RESULTS).read_text())["results"]
    return 100 * results[EVALSET[world]]["trained"]["top1"]


if __name__ == "__main__":
    main()
