"""A dry run of all 33 sets of the paper in their layouts, through the command line, to the report.

    python tests/benchmarks/dry_run_eval.py [FOLDER]

Covers: every set with its real number of classes and prompts and made-up images, two tiny models,
the flow as people start it (`python -m flows score`), a repeat from its caches, a set that fails,
the same digits from 16 ranks of two hosts (network namespaces) that an own command starts.
Not here: real images, so no figure means anything; the model is tiny, its file only bears the name
of a released one, so that the report compares it with the paper. Prints what was checked and how
long it took, and ends with status 1 when anything is missing.
"""

from __future__ import annotations

import json
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from evaclip_model.create import create_model
from evaclip_model.weights.load import released_tensors, save_model
from tasks.evaluate.sets.set_registry import known_sets
from tests.flows.command import CHECKOUT, Ended, environment
from tests.tasks.evaluate.all_sets import write_all_sets

ARCHITECTURE = "EVA02-CLIP-demo"
RELEASED_NAME = "EVA02_CLIP_B_psz16_s8B.pt"
TIMEOUT_S = 3600.0
HOST = """
for place in 0 1 2 3 4 5 6 7; do
    RANK=$(($1 * 8 + place)) WORLD_SIZE=16 "$2" -m "$3" "$4" & ranks="$ranks $!"
done
for rank in $ranks; do wait $rank || exit; done
"""
"""Runs eight ranks; it gets the number of the host, Python, the module and the job."""
TWO_HOSTS = """
unshare --map-root-user --net sh "$1" 0 "$2" "$3" "$4" & first=$!
unshare --map-root-user --net sh "$1" 1 "$2" "$3" "$4" && wait $first
"""
LARGEST_PAGE = 6_000_000
PARTS = (
    *("figures", "paper", "averages", "compute", "models", "sets"),
    *("provenance", "table-1a", "table-1b", "table-2", "table-3", "table-4"),
)


@dataclass(frozen=True)
class Check:
    """One thing that must hold."""

    what: str
    holds: bool
    found: str = ""


def main(folder: Path) -> int:
    """Run everything below `folder`, which is cleared first; returns the exit status."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started = time.monotonic()
    write_all_sets(folder / "sets")
    print(f"33 sets written in {time.monotonic() - started:.0f} s", flush=True)
    models = _models(folder)

    first, first_cpu_s = _timed(folder, models)
    again, again_cpu_s = _timed(folder, models)
    print(first.output)
    made = _made(folder)
    checks = [
        Check("the flow ends well", first.status == 0, first.errors[-500:]),
        *_results(made),
        *_page(made),
        *_tracking(folder),
        Check("a repeat finds it finished", again.status == 0 and made == _made(folder)),
        *_damaged(folder, models),
        *_over_two_hosts(folder, models, made),
    ]
    for one in checks:
        print(f"{'ok ' if one.holds else 'NOT'} {one.what:<48} {one.found}")
    print(f"first run {first.seconds:.0f} s ({first_cpu_s:.0f} CPU s)")
    print(f"repeat    {again.seconds:.0f} s ({again_cpu_s:.0f} CPU s)")
    print(f"report    {made / 'report.html'}")
    return 0 if all(one.holds for one in checks) else 1


def _models(folder: Path) -> list[str]:
    """Two models of the demo's architecture, as `score` is told of them."""
    weights = folder / RELEASED_NAME
    torch.save(released_tensors(create_model(ARCHITECTURE, seed=1)), weights)
    save_model(create_model(ARCHITECTURE, seed=2), folder / "champion")
    return [f"candidate={weights}:{ARCHITECTURE}", f"champion={folder / 'champion'}"]


def _score(
    folder: Path, models: Sequence[str], sets: str = "sets", root: str = "runs", **settings: str
) -> Ended:
    """`python -m flows score` with both models on all sets below `folder / sets`."""
    started = time.monotonic()
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "flows", "score", *models),
            *("--data", str(folder / sets), "--sets", "paper"),
        ],
        cwd=CHECKOUT,
        env=environment(folder / root, **settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr, time.monotonic() - started)


def _timed(folder: Path, models: Sequence[str]) -> tuple[Ended, float]:
    """The same, and the processor's seconds it took, its servers included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = _score(folder, models)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _made(folder: Path, root: str = "runs") -> Path:
    """The evaluation that is finished."""
    (manifest,) = (folder / root / "evaluate").glob("*/manifest.json")
    return manifest.parent


def _results(made: Path) -> list[Check]:
    results = json.loads((made / "results.json").read_text())
    sizes = {
        name: (one["n"], results["results"][name]["candidate"]["n"])
        for name, one in results["sets"].items()
    }
    classes = {
        key: (results["sets"][key]["classes"], known.classes)
        for key, known in known_sets().items()
        if key in results["sets"]
    }
    averages = results["averages"]
    return [
        Check("all 33 sets are in the results", set(sizes) == set(known_sets()), f"{len(sizes)}"),
        Check("every sample of an index is evaluated", all(a == b for a, b in sizes.values())),
        Check("every set has its real number of classes", all(a == b for a, b in classes.values())),
        Check(
            "the three averages are there",
            all(averages[table]["candidate"]["value"] is not None for table in ("1b", "2", "3")),
        ),
        Check("every set is compared in pairs", set(results["paired"]) == set(known_sets())),
    ]


def _page(made: Path) -> list[Check]:
    page = (made / "report.html").read_text()
    ids = set(re.findall(r'\bid="([^"]+)"', page))
    missing = [one for one in (*PARTS, *(f"set-{key}" for key in known_sets())) if one not in ids]
    outside = re.findall(r'(?:src|href)="(?!#|data:image/)([^"]+)"', page)
    markdown = (made / "report.md").read_text()
    return [
        Check("the page has every part and set", not missing, ", ".join(missing)),
        Check("no model of ours is put beside the paper's", "verdicts" not in ids),
        Check("the page asks for nothing", not outside, ", ".join(outside[:3])),
        Check("the page is small", len(page) < LARGEST_PAGE, f"{len(page) / 1e6:.2f} MB"),
        Check("the text has every table", markdown.count("### Table ") == 5),
    ]


def _tracking(folder: Path) -> list[Check]:
    """What MLflow's database has of the run."""
    with sqlite3.connect(folder / "runs" / "mlflow.db") as database:
        named = {name for (name,) in database.execute("select name from datasets")}
        (metrics,) = database.execute("select count(*) from latest_metrics").fetchone()
    kept = {path.name for path in (folder / "runs").rglob("artifacts/report.*")}
    return [
        Check("every set is a dataset of the run", set(known_sets()) <= named, f"{len(named)}"),
        Check("figures are metrics", metrics > 200, f"{metrics}"),
        Check("both reports are kept", kept == {"report.html", "report.md"}, ", ".join(kept)),
    ]


def _damaged(folder: Path, models: Sequence[str]) -> list[Check]:
    """One image of one set cannot be decoded: that set fails alone, and no average needs it."""
    shutil.copytree(folder / "sets", folder / "damaged")
    tar = folder / "damaged" / known_sets()["dtd"].wds / "test" / "0.tar"
    with tarfile.open(tar) as members:
        image = next(one for one in members if not one.name.endswith(".cls"))
    with tar.open("r+b") as file:
        file.seek(image.offset_data)
        file.write(bytes(image.size))
    ended = _score(folder, models, "damaged")
    left = [
        path
        for path in (folder / "runs" / "evaluate").glob("*/report.html")
        if not (path.parent / "manifest.json").exists()
    ]
    page = left[0].read_text() if left else ""
    refused = "1 of its 27 sets not evaluated: dtd"
    return [
        Check("a damaged set ends the flow with one sentence", ended.status == 2, ended.errors),
        Check("the others are reported", 'id="failed"' in page, f"{ended.seconds:.0f} s"),
        Check("the average is refused", refused in page),
        Check("an average without it stands", "95 % interval" in page and "Table 1b" in page),
    ]


def _over_two_hosts(folder: Path, models: Sequence[str], made: Path) -> list[Check]:
    """Everything once more, encoded by 16 ranks, eight on each of two hosts."""
    (folder / "host.sh").write_text(HOST)
    (folder / "two_hosts.sh").write_text(TWO_HOSTS)
    command = ("sh", folder / "two_hosts.sh", folder / "host.sh", sys.executable)
    settings = {"EVACLIP_LAUNCHER": "external", "EVACLIP_RANKS": "8", "EVACLIP_NODES": "2"}
    settings["EVACLIP_EVALUATE_GPUS"] = "0"
    settings["EVACLIP_SUBMIT_COMMAND"] = f"{' '.join(map(str, command))} {{module}} {{job}}"
    ended = _score(folder, models, root="runs-of-two-hosts", **settings)
    holds, found = False, ended.errors[-500:]
    if ended.status == 0:
        again = _made(folder, "runs-of-two-hosts")
        one, other = (json.loads((at / "results.json").read_text()) for at in (made, again))
        parts = ("results", "averages", "paired")
        holds, found = all(one[key] == other[key] for key in parts), f"{ended.seconds:.0f} s"
    return [Check("16 ranks of two hosts give the same digits", holds, found)]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/dry-run-eval").resolve()))
