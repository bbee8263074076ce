"""Kill -9 a download of 5,000 faulty URLs at ten random moments, and compare with its plan.

Four hosts on loopback have pictures and every fault (tests/tasks/download/faults.py). The download
is run once undisturbed; then again, in another folder, where at ten random moments after a start
the flow or one of its processes is killed, no process may be left, and the same command goes on.
Both must end with the expected outcome of every row, and the same samples. Then the web is taken
away in the middle of a third run, which must stop by itself, say so, and lose nothing.

    make test-download-faults          about 6 minutes on two cores
    PYTHONPATH=. python tests/faults/downloads.py [ROWS [KILLS [SEED]]]
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil

from tasks.download.config import Crew, DownloadConfig
from tasks.download.download import download_images
from tasks.download.fetch_outcome import Outcome
from tests.tasks.download.faults import (
    CONFIG,
    PRIVATE,
    Row,
    four_hosts,
    outcomes_of,
    rows_of,
    write_rows,
)

ROWS, KILLS, SEED = 5_000, 10, 20_261
OF_EACH, OF_EACH_SLOW = 40, 8
LATEST_KILL_S = 12.0
GONE_WITHIN_S = 30.0
RUN_LIMIT_S = 300.0
CREW = Crew(processes=2, threads=16)
BIG = CONFIG.model_copy(update={"samples_per_shard": 100})


def main(rows: int, kills: int, seed: int) -> int:
    with tempfile.TemporaryDirectory(prefix="evaclip-downloads-") as scratch:
        folder = Path(scratch)
        of_each = min(OF_EACH, rows // 100)
        with four_hosts() as webs:
            port = webs["127.0.0.1"].port
            wanted = write_rows(folder / "merged", rows_of(port, rows, of_each, OF_EACH_SLOW))
            began = time.monotonic()
            finish(folder, "undisturbed")
            whole_s = time.monotonic() - began
            refused = webs[PRIVATE].hits.total() == 0
        with four_hosts(port):
            moments = killed_and_finished(folder, kills, random.Random(seed))
        good = [
            told(f"undisturbed ({whole_s:.0f} s): outcomes as planned", differing(folder, wanted)),
            told("the private host was never asked", "" if refused else "it was"),
            told(f"killed after {', '.join(moments)}", f"{kills} wanted" * (len(moments) < kills)),
            told("killed: outcomes as planned", differing(folder, wanted, "killed")),
            told(
                f"killed: the same {len(samples(folder / 'killed')):,} samples",
                "others" * (samples(folder / "killed") != samples(folder / "undisturbed")),
            ),
            *network_lost(folder, port, wanted),
        ]
        print_outcomes(wanted)
    return 0 if all(good) else 1


def told(what: str, problem: str) -> bool:
    """Print a line; whether all is well."""
    print(f"| {what} | {problem or 'yes'} |", flush=True)
    return not problem


def start(folder: Path, name: str) -> subprocess.Popen[bytes]:
    """`download_images` as a process of its own, which a flow's is."""
    with (folder / f"{name}.txt").open("ab") as output:
        arguments = ["--download", str(folder / "merged"), str(folder / name)]
        return subprocess.Popen(
            [sys.executable, __file__, *arguments], stdout=output, stderr=output
        )


def finish(folder: Path, name: str) -> None:
    if status := start(folder, name).wait(RUN_LIMIT_S):
        sys.exit(f"{name} ended with {status}: {(folder / f'{name}.txt').read_text()[-2000:]}")


def killed_and_finished(folder: Path, kills: int, chance: random.Random) -> list[str]:
    """Kill at random moments until it was done often enough; `SECONDS:victim` of each."""
    done: list[str] = []
    while len(done) < kills:
        flow = psutil.Process(start(folder, "killed").pid)
        after_s = chance.uniform(0.2, LATEST_KILL_S)
        if gone_by_itself(flow, after_s):
            return done
        family = [flow, *flow.children(recursive=True)]
        victim = flow if chance.random() < 0.6 else chance.choice(family)
        who = "flow" if victim == flow else "part"
        victim.send_signal(signal.SIGKILL)
        done.append(f"{after_s:.1f}:{who}")
        if who == "part":
            # the flow may go on by itself, or say why it cannot; either way it comes back
            flow.send_signal(signal.SIGKILL)
        until(lambda: not left(folder / "killed"), "processes are left")
    finish(folder, "killed")
    return done


def gone_by_itself(process: psutil.Process, within_s: float) -> bool:
    try:
        process.wait(within_s)
    except psutil.TimeoutExpired:
        return False
    return True


def until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + GONE_WITHIN_S
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(otherwise)
        time.sleep(0.05)


def left(out: Path) -> list[int]:
    """Processes whose command line names the folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and str(out) in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def differing(folder: Path, wanted: dict[str, Row], name: str = "undisturbed") -> str:
    """The first rows that ended otherwise than planned; empty if none did."""
    ended = outcomes_of(folder / name)
    wrong = Counter(
        f"{row.kind}: {row.expected.value} became {ended.get(uid)}"
        for uid, row in wanted.items()
        if ended.get(uid) is not row.expected
    )
    return ", ".join(f"{number} x {what}" for what, number in wrong.most_common(5))


def samples(out: Path) -> set[tuple[str, bytes]]:
    """(uid, image) of all samples of all passes."""
    uid_at = {}
    images = {}
    for path in sorted(out.glob("**/shards/*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member).read()  # type: ignore[union-attr]
                key, _, extension = member.name.partition(".")
                if extension == "jpg":
                    images[key] = content
                elif extension == "json":
                    uid_at[key] = content.partition(b'"uid": "')[2][:32].decode()
    return {(uid_at[key], image) for key, image in images.items()}


def network_lost(folder: Path, port: int, wanted: dict[str, Row]) -> list[bool]:
    """Take the web away when a few shards are there; bring it back and go on."""
    out = folder / "cut off"
    finished = out / "shards"
    with four_hosts(port):
        flow = start(folder, out.name)
        until(lambda: len(list(finished.glob("*_stats.json"))) >= 5, "no shard was finished")
    try:
        status = flow.wait(GONE_WITHIN_S * 4)
    except subprocess.TimeoutExpired:
        flow.kill()
        return [told("without a web it stops by itself", "it went on")]
    said = (folder / f"{out.name}.txt").read_text().strip().rpartition("\n")[2]
    kept = {path.name: path.stat().st_mtime_ns for path in finished.glob("*_stats.json")}
    with four_hosts(port):
        finish(folder, out.name)
    after = {path.name: path.stat().st_mtime_ns for path in finished.glob("*_stats.json")}
    print(f"> {said}")
    return [
        told(
            "without a web it stops by itself, and says why",
            "" if status and "the network or its name service is down" in said else said,
        ),
        told(
            f"its {len(kept)} finished shards are not made again",
            "" if kept and all(after[name] == time_ns for name, time_ns in kept.items()) else "NO",
        ),
        told("afterwards: outcomes as planned", differing(folder, wanted, out.name)),
    ]


def print_outcomes(wanted: dict[str, Row]) -> None:
    print("\n| outcome | rows |\n|---|---|")
    for outcome, number in Counter(row.expected for row in wanted.values()).most_common():
        print(f"| {outcome.value} | {number:,} |")
    successes = sum(row.expected is Outcome.SUCCESS for row in wanted.values())
    print(f"\n{len(wanted):,} rows, {successes:,} of them samples in the end")


def download(merged: Path, out: Path, config: DownloadConfig) -> None:
    out.mkdir(exist_ok=True)
    download_images(config, merged, out, CREW, lambda *_: None)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--download"]:
        download(Path(sys.argv[2]), Path(sys.argv[3]), BIG)
    else:
        numbers = [int(argument) for argument in sys.argv[1:]]
        print(f"| {os.path.basename(__file__)} | as it must |\n|---|---|")
        sys.exit(main(*(*numbers, *(ROWS, KILLS, SEED)[len(numbers) :])))
