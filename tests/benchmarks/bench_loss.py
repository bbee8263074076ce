"""Memory of the losses, forward and backward, beside open_clip's sigmoid loss, by batch.

Traced: every operation is dispatched with the shapes it has and nothing is computed (fake tensors);
the bytes of all tensors that live at once are added up, features [B, 512] and their gradients
among them. Where a batch is named by --real, one process each really computes it, and its largest
resident memory is told too. Prints a Markdown table.

    make bench-loss
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import subprocess
import sys
import weakref
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evaclip_model.training.config import TeacherConfig
from evaclip_model.training.loss.contrastive import pair_terms

CHANNELS = 512
TEACHER = TeacherConfig(models=("one",))


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations made and that still live, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, Tensor) and one.untyped_storage()._cdata not in self._known:
                storage = one.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self._known.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, key, size)
        return made

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def their_loss() -> Any:
    """open_clip's sigmoid loss, from its file: the package imports far more than torch."""
    package = importlib.util.find_spec("open_clip")
    assert package is not None and package.origin is not None
    named = importlib.util.spec_from_file_location(
        "loss", Path(package.origin).with_name("loss.py")
    )
    assert named is not None and named.loader is not None
    module = importlib.util.module_from_spec(named)
    named.loader.exec_module(module)
    return module.SigLipLoss()


def run_loss(which: str, batch: int) -> None:
    draw = torch.randn if which != "nothing" else torch.zeros
    image, text = (
        torch.nn.functional.normalize(draw(batch, CHANNELS), dim=-1).requires_grad_()
        for _ in range(2)
    )
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    if which == "open_clip, sigmoid":
        their_loss()(image, text, scale, bias).backward()
    elif which != "nothing":
        own = [bias] if "sigmoid" in which else []
        taught = "teacher" in which
        teachers = [torch.zeros(batch, 2, 768, dtype=torch.float16)] if taught else []
        given = {"teachers": teachers, "teacher": TEACHER if taught else None}
        pair_terms(image, text, scale, *own, **given).loss.backward()


WAYS = ("open_clip, sigmoid", "ours, sigmoid", "ours, softmax", "ours, sigmoid, a teacher")


def trace(which: str, batch: int) -> float:
    with FakeTensorMode(), LiveBytes() as live:
        run_loss(which, batch)
    return live.peak / 2**20


def measure(which: str, batch: int) -> float:
    command = [sys.executable, __file__, "--worker", which, str(batch)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--real", type=int, nargs="*", default=[8192])
    parser.add_argument("--worker", nargs=2)
    asked = parser.parse_args()
    if asked.worker:
        torch.set_num_threads(1)
        run_loss(asked.worker[0], int(asked.worker[1]))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    real = {batch: measure("nothing", batch) for batch in asked.real}
    print(f"open_clip {version('open_clip_torch')}, torch {torch.__version__}; MiB\n")
    heads = [
        *(f"{batch:,}" for batch in asked.batches),
        *(f"{batch:,}, computed" for batch in real),
    ]
    print(f"| loss | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    for which in WAYS:
        found = [trace(which, batch) for batch in asked.batches]
        found += [measure(which, batch) - before for batch, before in real.items()]
        print(f"| {which} | {' | '.join(f'{one:,.0f}' for one in found)} |")


if __name__ == "__main__":
    main()
