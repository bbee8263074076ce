"""Kill -9 the flow, the download and a training rank at three moments each, then run again.

Every case has a folder of its own, is killed once, and is then run to its end with the same
command. It must end like the undisturbed run: the same figures, nothing finished made twice, no
process left. Prints one row a case and exits with 1 when one differs.

    make test-faults          about 20 minutes on two cores
    PYTHONPATH=. python tests/faults/interruptions.py rank-late     one case
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

COMMAND = [sys.executable, "-m", "flows", "run", "pipeline", "demo"]
SMALL = [
    "merge.sources.laion2b.target_count=500",
    "merge.sources.coyo700m.target_count=500",
    "download.samples_per_shard=64",
    "train.stage1.samples_seen=3840",
    "train.stage1.warmup_steps=10",
    "train.stage1.checkpoint_every_steps=10",
    "train.stage2.samples_seen=1280",
    "train.stage2.checkpoint_every_steps=5",
]
ENDED_S = 60
"""Time in which all processes of a killed flow have ended: the supervisor's grace, on a busy
machine."""
TIMEOUT_S = 600
KEPT = (
    *("demo", "merge", "download", "verify", "dataset"),
    *("initialise", "train", "evaluate", "register"),
)


@dataclass(frozen=True)
class Case:
    """Who is killed, and when: `is_time(root)` is asked every 50 ms."""

    name: str
    victim: str
    is_time: Callable[[Path], bool]
    given: tuple[str, ...] = ()
    """Stages taken over, finished, from the undisturbed run: what comes before is no part of it."""


def main(wanted: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="evaclip-faults-") as scratch:
        reference = Path(scratch) / "undisturbed"
        run_to_end(reference)
        print(
            f"{'case':<16} {'killed after':>12} {'made twice':>10} {'left over':>9}  same figures"
        )
        ends_well = [
            play(case, Path(scratch) / case.name, reference)
            for case in CASES
            if not wanted or case.name in wanted
        ]
    return 0 if all(ends_well) else 1


def play(case: Case, root: Path, reference: Path) -> bool:
    """Run, kill, run again, compare; print the row."""
    for kind in case.given:
        shutil.copytree(reference / kind, root / kind)
    started = time.monotonic()
    flow = start(root)
    while not case.is_time(root):
        if flow.poll() is not None or time.monotonic() - started > TIMEOUT_S:
            print(f"{case.name}: ended with {flow.returncode} before its moment came")
            return False
        time.sleep(0.05)
    victims = find(case.victim, flow.pid)
    killed_after = time.monotonic() - started
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    if case.victim != "flow":
        flow.wait(TIMEOUT_S)
    else:
        flow.wait()
    over = time.monotonic() + ENDED_S
    while (left := processes_of(root)) and time.monotonic() < over:
        time.sleep(1)
    left_over = len(left)
    before = manifests(root)
    run_to_end(root)
    made_twice = sum(manifests(root)[path] != text for path, text in before.items())
    same = figures(root) == figures(reference)
    shutil.rmtree(root)
    row = f"{case.name:<16} {killed_after:>10.1f} s {made_twice:>10} {left_over:>9}"
    print(f"{row}  {'yes' if same else 'NO'}", flush=True)
    return same and not made_twice and not left_over and bool(victims)


def start(root: Path) -> subprocess.Popen[bytes]:
    overrides = [part for override in SMALL for part in ("--set", override)]
    root.mkdir(parents=True, exist_ok=True)
    with (root / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [*COMMAND, *overrides],
            env={**os.environ, "EVACLIP_ROOT": str(root)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def run_to_end(root: Path) -> None:
    status = start(root).wait(TIMEOUT_S)
    if status:
        sys.exit(f"{root.name} ended with {status}:\n{(root / 'output.txt').read_text()[-2000:]}")


def manifests(root: Path) -> dict[Path, str]:
    """Every finished artifact's manifest, which carries the moment it was made."""
    return {
        path: path.read_text() for kind in KEPT for path in root.glob(f"{kind}/*/manifest.json")
    }


def figures(root: Path) -> dict[str, object]:
    """What must not differ: every figure of the evaluation, and the losses of every step."""
    evaluated = json.loads(next(root.glob("evaluate/*/results.json")).read_text())["results"]
    losses = {
        path.parent.name: [json.loads(line)["loss"] for line in path.read_text().splitlines()]
        for path in sorted(root.glob("train/*/metrics.jsonl"))
    }
    return {"results": evaluated, "losses": losses}


def find(victim: str, flow: int) -> list[int]:
    """Process ids to kill: the flow itself, img2dataset's process, or one training rank."""
    if victim == "flow":
        return [flow]
    marks = {"download": "tasks.download.download_worker", "rank": "evaclip_model.training.worker"}
    family = psutil.Process(flow).children(recursive=True)
    found = [child for child in family if is_running(child, marks[victim])]
    return [found[-1].pid] if found else []


def is_running(process: psutil.Process, module: str) -> bool:
    try:
        words = process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
    return words[1:3] == ["-m", module] or words[1:4] == ["-u", "-m", module]


def processes_of(root: Path) -> list[int]:
    """Processes that work on `root`, by their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("EVACLIP_ROOT") == str(root):
                found.append(process.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def exists(pattern: str) -> Callable[[Path], bool]:
    return lambda root: next(root.glob(pattern), None) is not None


def steps_done(training_stage: int, steps: int) -> Callable[[Path], bool]:
    """Whether the n-th training folder (in order of appearance) has that many metric lines."""

    def is_time(root: Path) -> bool:
        files = sorted(root.glob("train/*/metrics.jsonl"), key=lambda p: p.stat().st_ctime)
        folders = sorted(files, key=lambda p: (p.parent / "train.json").stat().st_mtime)
        if len(folders) <= training_stage:
            return False
        return folders[training_stage].read_bytes().count(b"\n") >= steps

    return is_time


def shards_done(count: int) -> Callable[[Path], bool]:
    return lambda root: len(list(root.glob("download/*/shards/*_stats.json"))) >= count


MERGED = ("demo", "merge")
DATA = (*MERGED, "download", "verify", "dataset", "initialise")
CASES = (
    Case("flow-early", "flow", exists("merge/*")),
    Case("flow-middle", "flow", steps_done(0, 14), DATA),
    Case("flow-late", "flow", exists("evaluate/*/*"), (*DATA, "train")),
    Case("download-early", "download", exists("download/*/*"), MERGED),
    Case("download-middle", "download", shards_done(2), MERGED),
    Case("download-late", "download", shards_done(10), MERGED),
    Case("rank-early", "rank", steps_done(0, 3), DATA),
    Case("rank-middle", "rank", steps_done(0, 23), DATA),
    Case("rank-late", "rank", steps_done(1, 7), DATA),
)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
