"""A registered model in an environment without this project: `bench_registry.py [--model NAME]`.

Makes an environment with only MLflow, torch, safetensors and Pillow (or takes that of --python),
registers a model with random weights, and loads it there: from a store on this disk, from an MLflow
server, from a server with its weights referred to. Then it is served there and asked with curl, and
pulled here in every form. Prints a Markdown table: time, memory, what is left on the disk.

Everything lies under one temporary folder, which is deleted. TORCH_INDEX_URL is obeyed as in
infra/environment.py.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import get_args

from PIL import Image

from evaclip_model.choices import Form
from evaclip_model.ports import find_free_port
from tasks.register.config import COPIED, LargeWeights
from tasks.register.model_registry import pull_model
from tasks.tracking import TrackingStore
from tests.tasks.register.registrations import register_random_model
from tests.tasks.register.servers import mlflow_server, model_server

CONSTRAINTS = Path(__file__).resolve().parents[2] / "infra" / "constraints.txt"
NEEDED = ("mlflow", "safetensors", "pillow")
LOAD = """
    import importlib.util, json, resource, sys, time
    started = time.monotonic()
    for name in ("tasks", "evaclip_model", "regex", "tokenizers", "ftfy", "open_clip"):
        assert importlib.util.find_spec(name) is None, f"{name} must not be installed"
    import mlflow, pandas, torch
    imported = time.monotonic()
    mlflow.set_tracking_uri(sys.argv[1])
    to = {"dst_path": sys.argv[3]} if len(sys.argv) > 3 else {}
    model = mlflow.pyfunc.load_model(sys.argv[2], **to)
    loaded = time.monotonic()
    model.predict(pandas.DataFrame({"text": ["ein schöner Apfel", "a dog"]}))
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([imported - started, loaded - imported, time.process_time(), kilobytes]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="EVA02-CLIP-B-16", help="architecture")
    parser.add_argument("--python", help="of an environment that is there already")
    parser.add_argument("--forms", nargs="*", default=get_args(Form), help="forms that are pulled")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as servers:
        root = Path(folder)
        python = chosen.python or bare_environment(root / "bare")
        stores = made_stores(root, chosen.model, servers)
        print(f"\n{chosen.model}, {weights_of(root) / 1e6:,.0f} MB of weights, in an environment")
        print("with only MLflow, torch, safetensors and Pillow.\n")
        print("| loaded from | import, s | load, s | CPU, s | peak, GB | left on the disk, MB |")
        print("|---|---|---|---|---|---|")
        for row in loads(root, python, stores):
            print(row, flush=True)
        print(f"\nserved: {served(root, python, stores['this disk'])}\n")
        print("| pulled as | s | MB |\n|---|---|---|")
        for form in chosen.forms:
            started = time.monotonic()
            pulled = pull_model(stores["a server"].uri, "clip@champion", root / f"as-{form}", form)
            seconds = time.monotonic() - started
            print(f"| {form} | {seconds:.1f} | {size_of(pulled) / 1e6:,.0f} |", flush=True)


def bare_environment(folder: Path) -> str:
    """Python of a new environment with only what a loader needs."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    versions = folder / "versions.txt"  # without hashes, or pip would want them of all
    found = re.findall(r"^[\w.-]+==[^\s;]+", CONSTRAINTS.read_text(), re.MULTILINE)
    versions.write_text("\n".join(found))
    install = [str(folder / "bin" / "pip"), "install", "-q", "-c", str(versions)]
    index = os.environ.get("TORCH_INDEX_URL")
    torch = [*install, *(("--index-url", index) if index else ()), "torch"]
    for command in (torch, [*install, *NEEDED]):
        subprocess.run(command, check=True)
    return str(folder / "bin" / "python")


def made_stores(root: Path, model: str, servers: ExitStack) -> dict[str, TrackingStore]:
    """A registry with the model as champion, for each way of keeping it."""
    stores = {"this disk": TrackingStore.at(f"sqlite:///{root}/mlflow.db", "bench")}
    for name in ("a server", "a server, weights referred to"):
        port = find_free_port()
        servers.enter_context(mlflow_server(root / f"server-{port}", port))
        stores[name] = TrackingStore.at(f"http://127.0.0.1:{port}", "bench")
    for name, store in stores.items():
        large = LargeWeights(0, str(root / "weights")) if "referred" in name else COPIED
        started = time.monotonic()
        register_random_model(store, root / "runs", "clip", large=large, architecture=model)
        print(f"registered in {name}: {time.monotonic() - started:.1f} s", flush=True)
    return stores


def weights_of(root: Path) -> int:
    (weights,) = (root / "runs").rglob("model.safetensors")
    return weights.stat().st_size


def loads(root: Path, python: str, stores: dict[str, TrackingStore]) -> Iterator[str]:
    """A table row for every store, and one for a server with a folder that is given."""
    ways = [(name, store, False) for name, store in stores.items()]
    ways.insert(2, ("a server, into a folder of one's own", stores["a server"], True))
    for place, (name, store, is_given) in enumerate(ways):
        temporary, given = root / f"temporary-{place}", root / f"given-{place}"
        temporary.mkdir()
        given.mkdir()
        arguments = [store.uri, "models:/clip@champion", *([str(given)] if is_given else [])]
        settings = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            [python, "-c", textwrap.dedent(LOAD), *arguments],
            cwd=temporary,
            env={**settings, "TMPDIR": str(temporary), "MLFLOW_DISABLE_TELEMETRY": "true"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        imported, loaded, cpu, kilobytes = json.loads(done.stdout.splitlines()[-1])
        left = size_of(temporary) / 1e6
        yield (
            f"| {name} | {imported:.1f} | {loaded:.1f} | {cpu:.1f} | {kilobytes / 1e6:.2f} "
            f"| {left:,.1f} |"
        )


def served(root: Path, python: str, store: TrackingStore) -> str:
    """What a model server of that environment answers to curl, and when it is up."""
    picture = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(picture, "PNG")
    request = {
        "dataframe_split": {
            "columns": ["image"],
            "data": [[base64.b64encode(picture.getvalue()).decode()]],
        },
        "params": {"candidate_labels": ["a red apple", "a dog"]},
    }
    started = time.monotonic()
    with model_server(root, store.uri, "models:/clip@champion", python) as address:
        up_s = time.monotonic() - started
        command = ["curl", "-sS", "-H", "content-type: application/json", "-d", "@-", address]
        started = time.monotonic()
        done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True)
        answer = json.loads(done.stdout)["predictions"][0]
    return f"up after {up_s:.1f} s, {answer} after {time.monotonic() - started:.1f} s"


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
