"""Evaluation beside the libraries it replaces: text classifiers, and a whole set.

Text classifiers: some of ImageNet's classes with all 80 templates, by open_clip's
`build_zero_shot_classifier` and by ours, same model, same process, in turns. A whole evaluation:
a set with ImageNet-V2's proportions (80 templates, ten images a class), by clip_benchmark's
command and by ours, each a process of its own, in turns; ours once with an empty cache and once
with what that left. Prints Markdown tables; figures go to BENCHMARKS.md by hand.

    make bench-eval
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from evaclip_model.zeroshot.exact_ranks import fill_templates
from evaclip_model.zeroshot.imagenet_prompts import imagenet_classnames, imagenet_templates
from tasks.encoders.open_clip_model import open_clip_subject
from tasks.evaluate.encode.encode_features import TextFeatures, answer_features, encode_texts
from tasks.evaluate.sets.convert.shard_writer import Found, Source, write_set
from tasks.evaluate.sets.published_layout import open_set

HERE = Path(__file__).resolve()
PEERS = HERE.parents[1] / "evaclip_model" / "peer_libraries.py"
MODEL = "ViT-B-32"
CLASSES, ROUNDS = 10, 3
WHOLE_CLASSES, IMAGES_PER_CLASS, WHOLE_ROUNDS = 30, 10, 2
IMAGE_SIZE = (500, 375)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=CLASSES)
    parser.add_argument("--whole-classes", type=int, default=WHOLE_CLASSES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--whole-rounds", type=int, default=WHOLE_ROUNDS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench-eval-") as scratch:
        folder = Path(scratch)
        weights = random_weights(folder / "weights.pt")
        classifier_table(weights, folder, options.classes, options.rounds)
        whole_table(weights, folder, options.whole_classes, options.whole_rounds)


def random_weights(path: Path) -> Path:
    """A file of initial values: how long anything takes does not depend on them."""
    torch.manual_seed(0)
    torch.save(peers().open_clip.create_model(MODEL).state_dict(), path)
    return path


def classifier_table(weights: Path, folder: Path, classes: int, rounds: int) -> None:
    library = peers().open_clip
    subject = open_clip_subject(f"{MODEL}/{weights}", "cpu", "fp32")
    names, templates = list(imagenet_classnames())[:classes], list(imagenet_templates())
    theirs = partial(
        library.build_zero_shot_classifier,
        *(subject.model, library.get_tokenizer(MODEL), names),
        [template.replace("{c}", "{}") for template in templates],
    )

    def ours(number: int) -> torch.Tensor:
        place = folder / f"texts-{number}"
        encode_texts(subject, list(dict.fromkeys(fill_templates(names, templates))), place)
        evalset = open_set("x", folder / "x", "classification", templates, classnames=names)
        return answer_features(evalset, TextFeatures(place))

    write_noise(folder / "x", names, templates, 1)
    theirs_s, ours_s = [], []
    for number in range(rounds):
        seconds, expected = timed(theirs)
        theirs_s.append(seconds)
        seconds, found = timed(partial(ours, number))
        ours_s.append(seconds)
    apart = float((found - expected.T).abs().max())
    best = [min(one) for one in (theirs_s, ours_s)]
    print(f"\n{classes} of 1000 classes x {len(templates)} templates, {MODEL}, best of {rounds}:\n")
    print("| classifier by | CPU s | wall s |\n|---|---|---|")
    for what, (cpu, wall) in zip(("open_clip", "ours"), best, strict=True):
        print(f"| {what} | {cpu:.1f} | {wall:.1f} |")
    print(f"\n{best[0][0] / best[1][0]:.1f} times less CPU; largest difference {apart:.1e}")


def timed(work: Callable[[], torch.Tensor]) -> tuple[tuple[float, float], torch.Tensor]:
    """(CPU, wall) seconds, and what was made."""
    cpu, wall = time.process_time(), time.perf_counter()
    made = work()
    return (time.process_time() - cpu, time.perf_counter() - wall), made


def whole_table(weights: Path, folder: Path, classes: int, rounds: int) -> None:
    names, templates = list(imagenet_classnames())[:classes], list(imagenet_templates())
    write_noise(folder / "set", names, templates, IMAGES_PER_CLASS)
    runs: dict[str, list[tuple[float, float]]] = {"clip_benchmark": [], "ours": [], "again": []}
    for number in range(rounds):
        given = {"weights": str(weights), "set": str(folder / "set"), "out": str(folder / "out")}
        given["cache"] = str(folder / f"cache-{number}")
        runs["clip_benchmark"].append(in_process(THEIRS, given))
        theirs = json.loads((folder / "out" / "theirs.json").read_text())["metrics"]["acc1"]
        for name in ("ours", "again"):
            runs[name].append(in_process(OURS, given))
            found = json.loads((folder / "out" / "results.json").read_text())
            top1 = found["results"]["set"]["m"]["top1"]
        print(f"round {number + 1}: top-1 {top1} by ours, {theirs} by clip_benchmark", flush=True)
    best = {name: min(seconds) for name, seconds in runs.items()}
    print(
        f"\n{classes} classes x {len(templates)} templates, {classes * IMAGES_PER_CLASS} images of "
        f"{IMAGE_SIZE[0]} x {IMAGE_SIZE[1]}, {MODEL}, fp32, one thread, best of {rounds}:\n"
    )
    print("| evaluation by | CPU s | wall s | less CPU | faster |\n|---|---|---|---|---|")
    titles = {"clip_benchmark": "clip_benchmark", "ours": "ours", "again": "ours, cached"}
    cpu, wall = best["clip_benchmark"]
    for name, title in titles.items():
        mine = best[name]
        less = f"{cpu / mine[0]:.1f} x | {wall / mine[1]:.1f} x"
        print(f"| {title} | {mine[0]:.1f} | {mine[1]:.1f} | {less} |")


def in_process(program: str, given: dict[str, str]) -> tuple[float, float]:
    """(CPU, wall) seconds of a program in a process of its own, its start included."""
    Path(given["out"]).mkdir(exist_ok=True)
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-c", program, json.dumps(given), str(PEERS)]
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, time.perf_counter() - wall


THEIRS = f"""
import json, runpy, sys, types
given = json.loads(sys.argv[1])
runpy.run_path(sys.argv[2])  # makes torchvision importable beside a CPU build of torch
captioning = "clip_benchmark.metrics.captioning"  # needs Java's tokenizer, and is not used
sys.modules[captioning] = types.ModuleType(captioning)
import torch
torch.set_num_threads(1)
sys.argv = ["clip_benchmark", "eval", "--dataset", "wds/set", "--dataset_root", given["set"],
            "--model", "{MODEL}", "--pretrained", given["weights"], "--num_workers", "0",
            "--task", "zeroshot_classification", "--no_amp", "--batch_size", "64",
            "--output", given["out"] + "/theirs.json"]
from clip_benchmark.metrics import zeroshot_classification
def accuracy(logits, target, topk):  # its own makes a number of an array, which numpy refuses now
    first = logits.topk(max(topk), 1, True, True)[1]
    return [float((first[:, :k] == target[:, None]).any(1).float().mean()) for k in topk]
zeroshot_classification.accuracy = accuracy
from clip_benchmark.cli import main
main()
"""
OURS = f"""
import json, sys
from pathlib import Path
from tasks.evaluate.config import EvalSetConfig, EvaluateConfig, EvaluationMachine
from tasks.evaluate.evaluate import evaluate_models
from tasks.progress import report_nothing
given = json.loads(sys.argv[1])
config = EvaluateConfig(sets=(EvalSetConfig(name="set", folder="-", kind="classification"),))
evaluate_models(config, {{"m": "open_clip:{MODEL}/" + given["weights"]}},
                {{"set": Path(given["set"])}}, [], Path(given["out"]), report_nothing,
                machine=EvaluationMachine(cache=Path(given["cache"])))
"""


def write_noise(folder: Path, names: list[str], templates: list[str], images: int) -> None:
    """A set of smooth noise in JPEG, so many images a class."""
    sources = [
        Source(str(number), partial(noise, number, number % len(names)))
        for number in range(images * len(names))
    ]
    write_set(
        folder, sources, kind="classification", plan="noise", classnames=names, templates=templates
    )


def noise(seed: int, label: int) -> Found:
    grain = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(grain).resize(IMAGE_SIZE).save(out, "JPEG", quality=90)
    return Found(out.getvalue(), "jpg", label)


def peers():  # a module without a package, as tests are
    spec = importlib.util.spec_from_file_location("peer_libraries", PEERS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
