"""Small real shards; and ranks: real processes over gloo, forked from one that imported all."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaclip_model.create import create_model
from evaclip_model.reading.samples import Shard, ShardManifest
from evaclip_model.weights.load import save_model
from tests.evaclip_model.trainer_runs import TINY


class Ranks:
    """Real processes that find each other as torch's launcher would have them."""

    def __init__(self, folder):
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        with (folder / "ranks.log").open("wb") as log:
            self._server = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("fork_ranks.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=env,
                text=True,
            )
        self._running = []

    def start(self, ranks, folder, *command):
        """Start `command` (a script or a module, then arguments) on each rank; process ids."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [str(part) for part in command]
        ask = {"run": command, "ranks": ranks, "port": port, "log": str(folder)}
        pids = self._ask(ask)
        self._running += pids
        return pids

    def wait(self, pids):
        """Exit codes, -N for signal N."""
        codes = self._ask({"wait": pids})
        self._running = [pid for pid in self._running if pid not in pids]
        return codes

    def run(self, ranks, folder, *command):
        """Start, wait, and show the logs when a rank failed."""
        codes = self.wait(self.start(ranks, folder, *command))
        assert codes == [0] * ranks, "".join(p.read_text()[-3000:] for p in folder.glob("rank-*"))

    def close(self):
        for pid in self._running:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._server.kill()  # it keeps nothing, and leaving Python takes long on a busy machine
        self._server.wait()
        self._server.stdin.close()

    def _ask(self, question):
        self._server.stdin.write(json.dumps(question) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


COLOURS = ["red", "green", "blue", "white", "black", "yellow", "purple", "orange"]


def write_shard(path, source, names, rng):
    with tarfile.open(path, "w") as tar:
        for name in names:
            pixels = rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)
            image = io.BytesIO()
            Image.fromarray(pixels).save(image, "png")
            record = json.dumps({"uid": name, "source": source}).encode()
            caption = f"a {COLOURS[int(name) % 8]} thing number {name}".encode()
            for extension, data in (("png", image.getvalue()), ("txt", caption), ("json", record)):
                member = tarfile.TarInfo(f"{name}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory):
    """A folder with `shards.json`: source a in three shards of 48 samples, b in two of 24."""
    return write_small_shards(tmp_path_factory.mktemp("data"))


def write_small_shards(folder):
    rng = np.random.default_rng(0)
    shards, first = [], 0
    for source, sizes in {"a": [20, 15, 13], "b": [10, 14]}.items():
        for number, size in enumerate(sizes):
            path = folder / f"{source}{number}.tar"
            write_shard(path, source, [f"{first + i:05d}" for i in range(size)], rng)
            first += size
            described = {"path": path.name, "source": source, "samples": size}
            described |= {"bytes": path.stat().st_size, "sha256": "0" * 64}
            shards.append(Shard(**described))
    ShardManifest(shards=tuple(shards)).write(folder / "shards.json")
    return folder


@pytest.fixture(scope="session")
def tiny_data(small_shards):
    """`small_shards` and, in `start/`, a tiny model to start training from."""
    save_model(create_model(TINY, seed=0), small_shards / "start")
    return small_shards
