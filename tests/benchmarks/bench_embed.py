"""Features of webdataset shards beside clip-retrieval's inference, images and captions.

Ours is the stage `embed` with EVA02-CLIP-B-16, theirs clip-retrieval's worker with open_clip's
ViT-B-16, which has as many parameters: each a process of its own on one core, in turns, once on a
few images and once on more; what the further ones cost counts, so that no start is in the figures.
Ours runs in fp32, as theirs, and in bf16, which theirs does not do on a CPU.
Shards hold whole chunks of 64, to which ours pads. Then ours is killed in a shard and goes on, and
two ranks share the shards: the same bytes (not with `--shards 1`, for a busy machine).

    python3 -m venv peer && peer/bin/pip install clip-retrieval==2.45.0 'transformers<5'
    make bench-embed PEER=peer/bin/python     # without PEER ours alone
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import mean

import numpy as np
import torch
import webdataset
from PIL import Image

from evaclip_model import create_model, save_model
from evaclip_model.choices import Precision
from evaclip_model.zeroshot.encode_chunks import IMAGE_CHUNK
from tasks.artifacts.artifact import Address, produce_artifact
from tasks.progress import report_nothing
from tasks.verify.config import STAGE as VERIFY, VerifyConfig
from tasks.verify.verify import verify_shards
from tests.evaclip_model.peer_libraries import open_clip

OURS, THEIRS = "EVA02-CLIP-B-16", "ViT-B-16"
WORDS = ("red", "apple", "two", "dogs", "a house", "by the sea", "in rain", "on a table")
PROGRAM = """
import sys
from pathlib import Path
from tasks.embed.config import EmbedConfig
from tasks.embed.embed import embed_samples
from tasks.progress import report_nothing
model, verified, out, ranks, precision = sys.argv[1:]
embed_samples(EmbedConfig(models=(model,), precision=precision), "ours", model, Path(verified),
              Path(out), report_nothing, ranks=int(ranks))
"""
ONE_CORE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", default="", help="a Python that has clip-retrieval")
    parser.add_argument("--images", type=int, nargs=2, default=(128, 256), help="few, and more")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-embed-") as scratch:
        folder = Path(scratch)
        save_model(create_model(OURS, seed=0), folder / "ours")
        torch.manual_seed(0)
        torch.save(open_clip.create_model(THEIRS).state_dict(), folder / "theirs.pt")
        few, more = options.images
        for count in (few, more):
            if count % (IMAGE_CHUNK * options.shards):
                sys.exit(f"--images {count}: not whole chunks of {IMAGE_CHUNK} in every shard")
            write_shards(folder / str(count), options.shards, count // options.shards)
        contenders: dict[str, Callable[..., list[str]]]
        contenders = {"embed, fp32": ours, "embed, bf16": partial(ours, precision="bf16")}
        if options.peer:
            contenders = {"clip-retrieval": theirs, **contenders}
        spent: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(options.rounds):
            for name, command in contenders.items():
                used = []
                for count in (few, more):
                    out = folder / f"out-{list(contenders).index(name)}-{number}-{count}"
                    used.append(cpu_of(command(folder, folder / str(count), out, options.peer)))
                spent[name].append((more - few) / (used[1] - used[0]))
                print(f"round {number + 1}, {name}: {spent[name][-1]:.3f} images/CPU s", flush=True)
        report(spent, options)
        if options.shards > 1:
            require_same_bytes(folder, folder / str(more))


def write_shards(folder: Path, shards: int, samples: int) -> None:
    """JPEGs of 256 pixels with captions of eight words, as img2dataset stores them."""
    tars = folder / "runs" / "download" / "d" / "shards"
    tars.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for number in range(shards):
        with webdataset.TarWriter(str(tars / f"{number:06d}.tar")) as tar:
            for place in range(samples):
                coarse = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                picture = Image.fromarray(coarse).resize((341, 256), Image.Resampling.BICUBIC)
                encoded = io.BytesIO()
                picture.save(encoded, "JPEG", quality=90)
                caption = " ".join(draw.choice(WORDS, 8))
                key = f"{number:03d}{place:06d}"
                record = json.dumps({"uid": key, "source": "s"})
                pair = {"__key__": key, "jpg": encoded.getvalue(), "txt": caption}
                tar.write({**pair, "json": record})
    config, root = VerifyConfig(), folder / "runs"
    address = Address.of(root, VERIFY, config, {"download": "d"})
    downloaded = root / "download" / "d"
    produce_artifact(address, lambda out: verify_shards(config, downloaded, out, 1, report_nothing))


def ours(
    folder: Path,
    shards: Path,
    out: Path,
    _: str = "",
    *,
    ranks: int = 1,
    precision: Precision = "fp32",
) -> list[str]:
    out.mkdir(exist_ok=True)
    (verified,) = (shards / "runs" / "verify").iterdir()
    words = [str(folder / "ours"), str(verified), str(out), str(ranks), precision]
    return [sys.executable, "-c", PROGRAM, *words]


def theirs(folder: Path, shards: Path, out: Path, peer: str) -> list[str]:
    out.mkdir()
    last = len(list(shards.glob("runs/download/d/shards/*.tar"))) - 1
    options = {
        "tasks": "[0]",
        "input_dataset": f"{shards}/runs/download/d/shards/{{000000..{last:06d}}}.tar",
        "output_folder": out,
        "output_partition_count": 1,
        "input_format": "webdataset",
        "batch_size": 64,
        "num_prepro_workers": 1,
        "clip_model": f"open_clip:{THEIRS}/{folder / 'theirs.pt'}",
        "use_jit": False,
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    return [peer, "-m", "clip_retrieval.clip_inference.worker", *words]


def cpu_of(command: list[str]) -> float:
    """CPU seconds, user and system, of a command and all that it starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(command, env={**os.environ, **ONE_CORE}, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{command}: {ended.stdout}\n{ended.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def report(spent: dict[str, list[float]], options: argparse.Namespace) -> None:
    """The table, and what it was measured on."""
    processor = next(
        line.partition(": ")[2]
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    print(f"\n{processor}, torch {version('torch')}, load {os.getloadavg()[0]:.1f}:\n")
    print("| by | images with captions a CPU second |\n|---|---|")
    for name, speeds in spent.items():
        print(f"| {name} | {mean(speeds):.3f} ({min(speeds):.3f} to {max(speeds):.3f}) |")
    if theirs_took := spent.pop("clip-retrieval", []):
        for name, speeds in spent.items():
            print(f"{name}: {mean(speeds) / mean(theirs_took):.2f} times as fast")


def require_same_bytes(folder: Path, shards: Path) -> None:
    """Kill ours in a shard, go on; have two ranks share the shards; compare with one."""
    environment = {**os.environ, **ONE_CORE}
    whole, killed, shared = folder / "whole", folder / "killed", folder / "shared"
    subprocess.run(ours(folder, shards, whole), check=True, env=environment)
    with subprocess.Popen(ours(folder, shards, killed), env=environment) as process:
        while not (killed / "state-0.json").exists() and process.poll() is None:
            time.sleep(0.01)  # its model is open, its shard is not done
        process.send_signal(signal.SIGKILL)
    left = len(list(killed.glob("features/*.parquet")))
    subprocess.run(ours(folder, shards, killed), check=True, env=environment)
    subprocess.run(ours(folder, shards, shared, ranks=2), check=True, env=environment)
    expected = {file.name: file.read_bytes() for file in whole.glob("features/*.parquet")}
    for out in (killed, shared):
        if {file.name: file.read_bytes() for file in out.glob("features/*.parquet")} != expected:
            sys.exit(f"{out.name} differs")
    print(f"killed after {left} of {len(expected)} shards, and two ranks: the same bytes")


if __name__ == "__main__":
    main()
