"""Disturb what a Prefect worker runs, in every way of a bad week, and press Retry.

    make test-crash-table                                         about 20 minutes on two cores
    PYTHONPATH=. python tests/faults/orchestration.py cancel      one row

Covers: a real Prefect server, MLflow server and workers, as `make up` starts them, on free ports
and in a folder that is removed; a deployment's run, disturbed in its middle; the state that Prefect
and MLflow show afterwards, processes that are left, and the end of the same run after a Retry,
which must be that of a run which nothing disturbed. Prints a Markdown table, and exits with 1 when
a row is not as expected.
Not here: commands without a lasting server (interruptions.py); ranks alone (training.py).
"""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from evaclip_model.ports import find_free_port
from tests.infra.site import OVER, Site, serving, wait_for

STEPS = 60
OVERRIDES = (
    "merge.sources.laion2b.target_count=400",
    "merge.sources.coyo700m.target_count=200",
    "download.samples_per_shard=64",
    "train.stage1.global_batch=64",
    f"train.stage1.samples_seen={STEPS * 64}",
    "train.stage1.checkpoint_every_steps=10",
    "train.stage2.global_batch=64",
    "train.stage2.samples_seen=320",
    "train.stage2.warmup_steps=2",
)
MIDDLE = STEPS // 3
"""Steps of the first training stage that are taken before the disturbance."""
TIMEOUT_S = 600.0
SERVER_AWAY_S = 60.0
GRACE_S = 60.0
"""What is still running then is left over, what MLflow shows as RUNNING then was not closed."""
LATE_REPORT_S = 8.0
"""Prefect's worker reports a crash twice; a Retry between the two is undone."""
POOL = "worker-gpu"
RUN_ID = "PREFECT__FLOW_RUN_ID"


@dataclass(frozen=True)
class Scene:
    """A site, the changes to the demo's recipe, and where its artifacts lie."""

    site: Site
    overrides: tuple[str, ...]

    @property
    def root(self) -> Path:
        return self.site.root

    def rows(self) -> list[dict[str, Any]]:
        """What the first training stage has written of its steps."""
        for job in self.root.glob("train/*/train.json"):
            metrics = job.with_name("metrics.jsonl")
            if json.loads(job.read_text())["train"]["name"] == "stage1" and metrics.is_file():
                whole = metrics.read_text().rpartition("\n")[0]
                return [json.loads(line) for line in whole.splitlines()]
        return []

    def outcome(self) -> dict[str, Any]:
        """Losses of every step of every training stage, and what was downloaded."""
        losses = {
            path.parent.name: [json.loads(line)["loss"] for line in path.read_text().splitlines()]
            for path in sorted(self.root.glob("train/*/metrics.jsonl"))
        }
        made = [json.loads(path.read_text()) for path in self.root.glob("download/*/manifest.json")]
        return {"losses": losses, "samples": [one["counts"]["samples"] for one in made]}

    def shards(self) -> int:
        return len(list(self.root.glob("download/*/shards/*_stats.json")))


def of_run(run_id: str) -> list[psutil.Process]:
    """Every process of a flow run, by its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(RUN_ID) == run_id and process.status() != "zombie":
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def flow_of(run_id: str) -> psutil.Process:
    """The process of the flow itself: the one whose parent is not of the run."""
    family = of_run(run_id)
    pids = {process.pid for process in family}
    return next(process for process in family if process.ppid() not in pids)


def running(run_id: str, module: str) -> list[psutil.Process]:
    """Processes of a run that are `python -m MODULE ...`, supervisors and launchers aside."""
    return [
        process
        for process in of_run(run_id)
        if process.cmdline()[1:3] == ["-m", module]
        or process.cmdline()[1:4] == ["-u", "-m", module]
    ]


def worker_of(site: Site) -> psutil.Process:
    """Prefect's own worker, below the one that starts it again."""
    return site.service(POOL).children()[0]


def cancel(site: Site, run_id: str) -> None:
    site.ask(f"flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING"}})


def kill_flow(site: Site, run_id: str) -> None:
    flow_of(run_id).kill()


def kill_launcher(site: Site, run_id: str) -> None:
    running(run_id, "torch.distributed.run")[0].kill()


def kill_rank(site: Site, run_id: str) -> None:
    running(run_id, "evaclip_model.training.worker")[-1].kill()


def kill_downloader(site: Site, run_id: str) -> None:
    running(run_id, "tasks.download.download_worker")[-1].kill()


def kill_worker(site: Site, run_id: str) -> None:
    worker_of(site).kill()


def stop_worker(site: Site, run_id: str) -> None:
    site.service(POOL).terminate()


def lose_host(site: Site, run_id: str) -> None:
    for process in [site.service(POOL), worker_of(site), *of_run(run_id)]:
        process.kill()


def server_away(site: Site, run_id: str) -> None:
    site.kill("prefect")
    time.sleep(SERVER_AWAY_S)
    site.command("up")


@dataclass(frozen=True)
class Event:
    """A disturbance, and what it may lead to."""

    title: str
    cause: Callable[[Site, str], None]
    states: tuple[str, ...]
    """States that the disturbed run may end in."""
    flow: str = "train"
    """What is disturbed: `train` in its first stage's middle, or `prepare` in its download's."""
    machine_stays: bool = True
    """Else nobody is left who could close the run in MLflow: the next run there does."""


EVENTS = {
    "cancel": Event("cancelled in the UI", cancel, ("CANCELLED",)),
    "flow": Event("kill -9 of the flow's process", kill_flow, ("CRASHED",)),
    "launcher": Event("kill -9 of torchrun", kill_launcher, ("COMPLETED",)),
    "rank": Event("kill -9 of a rank", kill_rank, ("COMPLETED",)),
    "download": Event(
        "kill -9 of img2dataset's process", kill_downloader, ("COMPLETED", "FAILED"), "prepare"
    ),
    "worker": Event("kill -9 of the worker", kill_worker, ("COMPLETED", "CRASHED")),
    "stop": Event("SIGTERM of the worker", stop_worker, ("CRASHED",)),
    "host": Event("the whole machine gone", lose_host, ("CRASHED",), machine_stays=False),
    "server": Event(
        f"Prefect's server killed, {SERVER_AWAY_S:.0f} s away", server_away, ("COMPLETED",)
    ),
}
CLOSED = {"FINISHED", "FAILED", "KILLED"}
COLUMNS = ("event", "state after", "in s", "processes left", "MLflow run", "Retry", "same figures")


def main(wanted: Sequence[str]) -> int:
    overrides = (f"demo.port={find_free_port()}", *OVERRIDES)
    with (
        tempfile.TemporaryDirectory(prefix="evaclip-crashes-") as folder,
        serving(Path(folder)) as site,
    ):
        scene = Scene(site, overrides)
        for flow in ("prepare", "train"):
            state = site.until_over(site.start(flow, overrides), 2 * TIMEOUT_S)
            if state != "COMPLETED":
                print(f"{flow}, undisturbed, is {state}")
                return 1
        undisturbed = scene.outcome()
        print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
        ends_well = [
            play(scene, event, undisturbed)
            for name, event in EVENTS.items()
            if not wanted or name in wanted
        ]
        if not wanted or "mlflow" in wanted:
            ends_well.append(play_outage(scene, undisturbed))
    return 0 if all(ends_well) else 1


def play(scene: Scene, event: Event, undisturbed: Mapping[str, Any]) -> bool:
    """Disturb a run, press Retry, compare; print the row."""
    site = scene.site
    run_id = begin(scene, event.flow)
    struck = time.monotonic()
    event.cause(site, run_id)
    state = site.until_over(run_id, TIMEOUT_S)
    took = time.monotonic() - struck
    if event.machine_stays:
        wait_for(lambda: tracked(site, run_id) <= CLOSED, GRACE_S)
    shown = tracked(site, run_id)
    wait_for(lambda: not of_run(run_id), GRACE_S)
    left = len(of_run(run_id))
    for process in of_run(run_id):
        print(f"left over: {process.cmdline()}", file=sys.stderr)
    then = "not needed"
    if state != "COMPLETED":
        site.command("up")  # a worker that was stopped or lost
        then = retry(site, run_id)
    later = tracked(site, run_id)
    same = scene.outcome() == undisturbed
    told = " ".join(sorted(shown))
    if later != shown:
        told += f", then {' '.join(sorted(later))}"
    cells = (event.title, state.capitalize(), f"{took:.0f}", left, told, then.capitalize())
    print(f"| {' | '.join(map(str, cells))} | {'yes' if same else 'NO'} |", flush=True)
    good = state in event.states and then in ("COMPLETED", "not needed")
    closed = later <= CLOSED and (shown <= CLOSED or not event.machine_stays)
    return good and not left and closed and same


def begin(scene: Scene, flow: str) -> str:
    """Id of a new run of the flow that does its work anew, now in its middle."""
    if flow == "train":
        shutil.rmtree(scene.root / "train")
    else:
        for kind in ("download", "verify", "dataset"):
            shutil.rmtree(scene.root / kind)
    run_id = scene.site.start(flow, scene.overrides)

    def is_its_time() -> bool:
        middle = len(scene.rows()) >= MIDDLE if flow == "train" else scene.shards() >= 2
        return middle or scene.site.state(run_id) in OVER

    if not wait_for(is_its_time, TIMEOUT_S):
        raise RuntimeError(f"run {run_id} does not begin; it is {scene.site.state(run_id)}")
    return run_id


def retry(site: Site, run_id: str) -> str:
    """The state that the run ends in after what the UI's Retry does."""
    time.sleep(LATE_REPORT_S)
    waiting = {"type": "SCHEDULED", "name": "AwaitingRetry"}
    site.ask(f"flow_runs/{run_id}/set_state", {"state": waiting, "force": True})
    return site.until_over(run_id, TIMEOUT_S)


def play_outage(scene: Scene, undisturbed: Mapping[str, Any]) -> bool:
    """MLflow's server away for the middle third of a training; print what it cost and lost."""
    site = scene.site
    run_id = begin(scene, "train")
    site.kill("mlflow")
    away_from = len(scene.rows())
    wait_for(lambda: len(scene.rows()) >= 2 * MIDDLE, TIMEOUT_S)
    away_to = len(scene.rows())
    site.command("up")
    state = site.until_over(run_id, TIMEOUT_S)
    times = [row["step_s"] for row in scene.rows()]
    around = statistics.median(times[5:away_from] + times[away_to:])
    meanwhile = statistics.median(times[away_from:away_to])
    stored = stored_losses(site, run_id)
    written = [row["loss"] for row in scene.rows()]
    print(
        f"\nMLflow's server away from step {away_from} to {away_to} of {STEPS}: the run is "
        f"{state.capitalize()}; losses of {len(stored)} steps are stored, "
        f"{len(written) - len(stored)} lost; a step took {meanwhile * 1000:.0f} ms without it, "
        f"{around * 1000:.0f} ms with it (medians).",
        flush=True,
    )
    return state == "COMPLETED" and stored == written and scene.outcome() == undisturbed


def runs_where(site: Site, condition: str) -> list[Any]:
    """MLflow's runs of all experiments, the newest first."""
    found = site.ask_mlflow("experiments/search", {"max_results": 100})["experiments"]
    experiments = [experiment["experiment_id"] for experiment in found]
    body = {"experiment_ids": experiments, "filter": condition, "order_by": ["start_time DESC"]}
    return list(site.ask_mlflow("runs/search", body).get("runs", []))


def tracked(site: Site, run_id: str) -> set[str]:
    """What MLflow shows of the runs that a flow run began, one an attempt."""
    found = runs_where(site, f"tags.`prefect.flow_run_id` = '{run_id}'")
    return {str(one["info"]["status"]) for one in found} or {"none"}


def stored_losses(site: Site, run_id: str) -> list[float]:
    """The losses of the first training stage, in order of their steps, from MLflow."""
    (parent,) = runs_where(site, f"tags.`prefect.flow_run_id` = '{run_id}'")
    (stage,) = runs_where(
        site,
        f"tags.`mlflow.parentRunId` = '{parent['info']['run_id']}' "
        "and attributes.run_name = 'train stage1'",
    )
    stage_id = stage["info"]["run_id"]
    query = f"metrics/get-history?run_id={stage_id}&metric_key=loss&max_results=10000"
    history = site.ask_mlflow(query)["metrics"]
    return [metric["value"] for metric in sorted(history, key=lambda metric: metric["step"])]


if __name__ == "__main__":
    # A script's child in the background ignores Ctrl-C, which Prefect's worker needs to end.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
