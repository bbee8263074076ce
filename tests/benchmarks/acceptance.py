"""Sixty thousand real pictures through the whole pipeline, and one number from every evaluation.

Debian's `dataset-fashion-mnist` is served on loopback, downloaded, trained on with captions, and
its 10,000 test images are classified zero-shot. The same model is then evaluated by one rank and
two, zero to four workers, sets of one tar and of seven, interrupted and resumed: every figure must
be the same to the last digit. Retrieval has the real captions of `tuxpaint-stamps-default`.

    apt-get install dataset-fashion-mnist tuxpaint-stamps-default
    make acceptance
"""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import Process
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tasks.evaluate.sets.convert.shard_writer import Found, Source, image_file, write_set

WORK = Path("runs/acceptance").absolute()
FASHION = Path("/usr/share/datasets/fashion-mnist")
STAMPS = Path("/usr/share/tuxpaint/stamps")
DATA = Path(__file__).with_name("data")
CHECKOUT = Path(__file__).resolve().parents[2]
PORT = 8931
CLASSES = (
    *("t-shirt or top", "pair of trousers", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
TEMPLATES = ("a photo of a {c}", "a grey picture of a {c}", "a {c} in a shop window", "{c}")
LEAST_TOP1 = 0.84
MOST_CPU_S = 600.0
VARIANTS = tuple(
    (ranks, workers, 7 if (ranks + workers) % 2 else 1) for ranks in (1, 2) for workers in range(5)
)
"""(ranks, workers, tars)"""


def main() -> None:
    for folder in (FASHION, STAMPS):
        if not folder.is_dir():
            sys.exit(f"{folder} is missing: apt-get install {' '.join(PACKAGES)}")
    WORK.mkdir(parents=True, exist_ok=True)
    for name in ("fashion.json", "fashion.toml"):
        shutil.copy(DATA / name, WORK / name)
    write_data()
    spent = run_pipeline()
    (model,) = (WORK / "runs" / "train").glob("*/model")
    expected = evaluate("plain", model, 1, 0, 1)
    print("| ranks | workers | tars | | top-1 | all figures |\n|---|---|---|---|---|---|")
    row("1 | 0 | 1 | ", expected, expected)
    for ranks, workers, tars in VARIANTS:
        found = evaluate(f"r{ranks}-w{workers}", model, ranks, workers, tars)
        row(f"{ranks} | {workers} | {tars} | ", found, expected)
    row("2 | 1 | 7 | killed, resumed", interrupted(model), expected)
    top1, stamps = expected["fashion"]["model"]["top1"], expected["stamps"]["model"]
    cpu = spent["train"] + spent["evaluate"]
    print(
        f"\nFashion-MNIST zero-shot top-1 {100 * top1:.2f} % of 10,000 (chance 10 %), "
        f"{cpu / 60:.1f} CPU-minutes of training and evaluation; "
        f"{spent['prepare'] / 60:.1f} more for the data."
    )
    print(
        f"Stamps: {stamps['n']} images, {stamps['captions']} captions, image to text "
        f"R@10 {100 * stamps['image_to_text_r10']:.2f} %."
    )
    if top1 < LEAST_TOP1 or cpu > MOST_CPU_S:
        sys.exit(f"expected {LEAST_TOP1:.0%} within {MOST_CPU_S:.0f} CPU-seconds")


PACKAGES = ("dataset-fashion-mnist", "tuxpaint-stamps-default")


def row(what: str, found: dict, expected: dict) -> None:
    """Print a line; end if any figure differs."""
    same = found == expected
    print(f"| {what} | {found['fashion']['model']['top1']!r} | {'same' if same else 'DIFFER'} |")
    if not same:
        sys.exit("figures differ")


def write_data() -> None:
    """Metadata of the training images, and the sets, each in one tar and in seven."""
    if not (WORK / "metadata").is_dir():
        labels = read_labels("train")
        beside = WORK / "metadata.part"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        table = pa.table(
            {
                "url": [f"http://127.0.0.1:{PORT}/{number}.png" for number in range(len(labels))],
                "caption": [CLASSES[label] for label in labels],
                "width": pa.array([28] * len(labels), pa.int32()),
                "height": pa.array([28] * len(labels), pa.int32()),
            }
        )
        pq.write_table(table, beside / "part-00000.parquet")
        beside.rename(WORK / "metadata")
    fashion, stamps = fashion_sources(), stamp_sources()
    for tars in (1, 7):
        write_set(
            WORK / "sets" / f"fashion-{tars}",
            fashion,
            kind="classification",
            plan="fashion",
            classnames=CLASSES,
            templates=TEMPLATES,
            images_per_tar=-(-len(fashion) // tars),
        )
        write_set(
            WORK / "sets" / f"stamps-{tars}",
            stamps,
            kind="retrieval",
            plan="stamps",
            images_per_tar=-(-len(stamps) // tars),
        )


def fashion_sources() -> list[Source]:
    images, labels = read_images("t10k"), read_labels("t10k").tolist()
    return [
        Source(str(number), partial(lambda image, label: Found(png(image), "png", label), *pair))
        for number, pair in enumerate(zip(images, labels, strict=True))
    ]


def stamp_sources() -> list[Source]:
    """Every stamp that is a bitmap and has a description in English."""
    found = []
    for picture in sorted(STAMPS.rglob("*.png")):
        text = picture.with_suffix(".txt")
        caption = (
            text.read_text("utf-8", "replace").split("\n")[0].strip() if text.is_file() else ""
        )
        if caption:
            found.append(Source(str(picture), partial(read_stamp, picture), answer=(caption,)))
    return found


def read_stamp(picture: Path) -> Found:
    return image_file(picture.read_bytes())


def read_images(part: str) -> np.ndarray:
    """Grey images [N, 28, 28] uint8."""
    content = gzip.decompress((FASHION / f"{part}-images-idx3-ubyte.gz").read_bytes())
    return np.frombuffer(content, np.uint8, offset=16).reshape(-1, 28, 28)


def read_labels(part: str) -> np.ndarray:
    content = gzip.decompress((FASHION / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    return np.frombuffer(content, np.uint8, offset=8)


def png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG", compress_level=3)
    return out.getvalue()


def run_pipeline() -> dict[str, float]:
    """Run the flows; CPU seconds of each, remembered from when they did the work."""
    log = WORK / "cpu.json"
    spent: dict[str, float] = json.loads(log.read_text()) if log.is_file() else {}
    with serving():
        for flow in ("prepare", "train", "evaluate"):
            before = time.monotonic(), cpu_of_children()
            command = [sys.executable, "-m", "flows", "run", flow, "fashion.toml"]
            subprocess.run(command, check=True, cwd=WORK, env=environment())
            used = cpu_of_children() - before[1]
            print(f"{flow}: {used:.0f} CPU s, {time.monotonic() - before[0]:.0f} s", flush=True)
            spent[flow] = max(used, spent.get(flow, 0.0))
            log.write_text(json.dumps(spent))
    return spent


def cpu_of_children() -> float:
    """CPU seconds of all that this process started and that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("EVACLIP_", "PREFECT_"))}
    return {**kept, "EVACLIP_ROOT": str(WORK / "runs"), "PYTHONPATH": str(CHECKOUT)}


@contextmanager
def serving() -> Iterator[None]:
    """The training images on loopback."""
    process = Process(target=serve, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join()


def serve() -> None:
    images = read_images("train")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.strip("/").removesuffix(".png")
            found = name.isdecimal() and int(name) < len(images)
            content = png(images[int(name)]) if found else b""
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "image/png")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Sixty thousand lines say nothing."""

    ThreadingHTTPServer.request_queue_size = 256
    ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()


PROGRAM = """
import json, sys
from pathlib import Path
from flows.config.recipe import load_recipe
from tasks.evaluate.config import EvaluationMachine
from tasks.evaluate.evaluate import evaluate_models
from tasks.progress import report_nothing
given = json.loads(sys.argv[1])
sets = {name: Path(folder) for name, folder in given["sets"].items()}
out = Path(given["out"])
out.mkdir(parents=True, exist_ok=True)
evaluate_models(load_recipe("fashion.toml").evaluate, {"model": given["model"]}, sets, [], out,
                report_nothing,
                machine=EvaluationMachine(ranks=given["ranks"], workers=given["workers"]))
"""


def command(name: str, model: Path, ranks: int, workers: int, tars: int) -> list[str]:
    out = WORK / "variants" / name
    shutil.rmtree(out, ignore_errors=True)
    sets = {one: str(WORK / "sets" / f"{one}-{tars}") for one in ("fashion", "stamps")}
    given = {"model": str(model), "sets": sets, "out": str(out), "ranks": ranks, "workers": workers}
    return [sys.executable, "-c", PROGRAM, json.dumps(given)]


def evaluate(name: str, model: Path, ranks: int, workers: int, tars: int) -> dict:
    """All figures of a whole evaluation without a cache."""
    subprocess.run(
        command(name, model, ranks, workers, tars), check=True, cwd=WORK, env=environment()
    )
    return figures(name)


def interrupted(model: Path) -> dict:
    """Killed with all its ranks three times while it makes features, then resumed."""
    arguments = command("killed", model, 2, 1, 7)
    for blocks in (3, 12, 25):
        with subprocess.Popen(arguments, cwd=WORK, env=environment()) as process:
            wait_for(partial(is_at, blocks, process))
            process.send_signal(signal.SIGKILL)
        if not 3 <= len(finished_blocks()) < 45:
            sys.exit("the evaluation was not killed while it made features")
    subprocess.run(arguments, check=True, cwd=WORK, env=environment())
    return figures("killed")


def is_at(blocks: int, process: subprocess.Popen[bytes]) -> bool:
    return len(finished_blocks()) >= blocks or process.poll() is not None


def finished_blocks() -> Sequence[Path]:
    return list((WORK / "variants" / "killed" / "features").rglob("*.safetensors"))


def wait_for(met: Callable[[], bool]) -> None:
    while not met():
        time.sleep(0.05)


def figures(name: str) -> dict:
    results = json.loads((WORK / "variants" / name / "results.json").read_text())
    return results["results"]


if __name__ == "__main__":
    main()
