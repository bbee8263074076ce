"""`python -m flows` as a person runs it, on a demo so small that tests can wait for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from evaclip_model.ports import find_free_port

CHECKOUT = Path(__file__).resolve().parents[2]
FROM_OUTSIDE = ("EVACLIP_", "MLFLOW_", "PREFECT_", "PYTHONPATH")
"""Settings of whoever runs the tests; they must not reach what is tested."""
TIMEOUT_S = 240.0


@dataclass(frozen=True)
class Ended:
    """A command that ended."""

    status: int
    output: str
    errors: str
    seconds: float


@dataclass(frozen=True)
class Demo:
    """A root and the overrides that make the demo small."""

    root: Path
    overrides: tuple[str, ...]

    def arguments(self, *command: str, also: Sequence[str] = ()) -> list[str]:
        """`command demo --set ...`, with further overrides after the demo's own."""
        sets = [part for override in (*self.overrides, *also) for part in ("--set", override)]
        return [*command, "demo", *sets]


def small_demo(root: Path) -> Demo:
    """600 rows, 10 and 5 steps of 64 samples, one prompt a class; a port that is free now."""
    return Demo(
        root,
        (
            f"demo.port={find_free_port()}",
            "merge.sources.laion2b.target_count=400",
            "merge.sources.coyo700m.target_count=200",
            "download.timeout_s=2",
            "download.deadline_s=2",
            "train.stage1.global_batch=64",
            "train.stage1.samples_seen=640",
            "train.stage1.warmup_steps=5",
            "train.stage2.global_batch=64",
            "train.stage2.samples_seen=320",
            "train.stage2.warmup_steps=2",
            'evaluate.sets.emoji-twemoji.templates=["{c}"]',
        ),
    )


def environment(root: Path | str, **more: str) -> dict[str, str]:
    """This process's environment without its settings, with everything under `root`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(FROM_OUTSIDE)}
    return {**kept, "EVACLIP_ROOT": str(root), "OMP_NUM_THREADS": "1", **more}


def run(arguments: Sequence[str], root: Path | str, **settings: str) -> Ended:
    """`python -m flows ARGUMENTS`, to its end."""
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", "flows", *arguments],
        cwd=CHECKOUT,
        env=environment(root, **settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr, time.monotonic() - started)


@contextmanager
def started(
    arguments: Sequence[str], root: Path | str, **settings: str
) -> Iterator[subprocess.Popen[str]]:
    """The same, under way in a process group of its own; what is left at the end is killed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "flows", *arguments],
        cwd=CHECKOUT,
        env=environment(root, **settings),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_hear_ctrl_c,
    )
    try:
        yield process
    finally:
        for left in processes_of(root):
            left.send_signal(signal.SIGKILL)
        process.wait(TIMEOUT_S)


def _hear_ctrl_c() -> None:
    # Tests in a shell's background inherit that Ctrl-C is ignored; Python keeps it so.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def processes_of(root: Path | str) -> list[psutil.Process]:
    """Every process that works on `root`, by its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("EVACLIP_ROOT") == str(root):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
