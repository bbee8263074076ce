"""What an objective is worth for the same CPU minutes, on Debian's Fashion-MNIST.

Every batch shows each of ten captions many times, so that what equal captions are to each other
matters. Each way is trained from several seeds of weights and order; the share of test images that
it names right, with Student's interval of its difference to CLIP's softmax, pair by pair of seeds.
A larger model, trained as long, is the teacher of the last way: what `teach` costs is taken from
the student's samples.

    apt-get install dataset-fashion-mnist
    make bench-objectives           # SAMPLES=15104 for an eighth of it
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from statistics import mean, stdev

from evaclip_model.training.config import MODEL_FOLDER
from flows.config.profile import Profile
from flows.config.recipe import load_recipe
from flows.graph.graph import Graph, draw_graph
from tasks.progress import report_nothing
from tests.benchmarks import bench_noise
from tests.benchmarks.acceptance import FASHION, cpu_of_children

WORK = Path("runs/objectives").absolute()
WAYS = {
    "softmax": (),
    "softmax, positive": ("same_caption=positive",),
    "softmax, ignore": ("same_caption=ignore",),
    "sigmoid": ("objective=sigmoid",),
    "sigmoid, positive": ("objective=sigmoid", "same_caption=positive"),
    "sigmoid, ignore": ("objective=sigmoid", "same_caption=ignore"),
}
TEACHER = "softmax, a teacher"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--samples", type=int, default=120_064, help="seen in a training")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    if not FASHION.is_dir():
        sys.exit(f"{FASHION} is missing: apt-get install dataset-fashion-mnist")
    WORK.mkdir(parents=True, exist_ok=True)
    bench_noise.WORK, bench_noise.SHARE["fashion"] = WORK, 0.0
    recipe, plain, _, _ = bench_noise.prepare_fashion(0, options)
    os.chdir(WORK)
    plain = [*plain[:2], f"train.train.warmup_steps={min(40, options.samples // 256 // 5)}"]
    larger = json.loads(Path("fashion.json").read_text())
    for tower in ("vision", "text"):
        larger[tower]["layers"] *= 2
    Path("larger.json").write_text(json.dumps(larger))
    _, minutes, teacher = train(recipe, [*plain, "initialise.model=larger.json"], WAYS["softmax"])
    print(f"the teacher: {minutes:.2f} CPU minutes", flush=True)
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in range(options.seeds):
        seeds = [*plain, f"initialise.seed={seed}", f"train.train.seed={seed}"]
        for name, way in WAYS.items():
            found.setdefault(name, []).append(train(recipe, seeds, way)[:2])
        lessons = [f"teacher.models=['{teacher}']", f"samples_seen={options.samples}"]
        spent = train(recipe, seeds, lessons, teach_alone=True)[1]
        share = 1 - spent / (spent + found["softmax"][-1][1])
        lessons[1] = f"samples_seen={int(options.samples * share) // 256 * 256}"
        found.setdefault(TEACHER, []).append(train(recipe, seeds, lessons)[:2])
    print("\n| | top-1, % | against softmax, 95 % | CPU minutes of training | seeds |")
    print("|---|--:|---|--:|---|")
    for name, rows in found.items():
        gains = [a[0] - b[0] for a, b in zip(rows, found["softmax"], strict=True)]
        half = bench_noise.STUDENT.get(len(gains), 2.0) * stdev(gains) / len(gains) ** 0.5
        tops = ", ".join(f"{top:.2f}" for top, _ in rows)
        against = f"{mean(gains):+.2f}, {mean(gains) - half:+.2f} to {mean(gains) + half:+.2f}"
        print(
            f"| {name} | {mean(top for top, _ in rows):.2f} | {against if any(gains) else ''} "
            f"| {mean(spent for _, spent in rows):.2f} | {tops} |"
        )


def train(
    recipe: str, changes: list[str], way: tuple[str, ...] | list[str], *, teach_alone: bool = False
) -> tuple[float, float, Path]:
    """Top-1 in percent, the CPU minutes of `teach` and training, and the model."""
    words = [*changes, *(f"train.train.{one}" for one in way)]
    graph: Graph = draw_graph(load_recipe(recipe, words), WORK / "runs", f"sqlite:///{WORK}/m.db")
    profile, spent = Profile(root=WORK / "runs"), 0.0
    for step in graph.steps:
        if step.stage.name == "register" or (teach_alone and step.stage.name == "train"):
            break
        before = cpu_of_children()
        if not step.is_finished:
            step.make_artifact(profile, report_nothing)
        if step.stage.name in ("teach", "train"):
            spent += (cpu_of_children() - before) / 60
    if teach_alone:
        return 0.0, spent, Path()
    results = json.loads((graph.evaluate.folder / "results.json").read_text())["results"]
    top1 = 100 * results["fashion"]["trained"]["top1"]
    print(f"{words[3:]}: {top1:.2f} % after {spent:.2f} CPU minutes, {time.ctime()}", flush=True)
    return top1, spent, graph.final.folder / MODEL_FOLDER


if __name__ == "__main__":
    main()
