"""Training one stage in processes of its own, followed through its folder; trying a stage out.

Not here: the training itself (evaclip_model/training/worker.py); what starts ranks
(tasks/process).
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from evaclip_model.errors import InputError, escape_control
from evaclip_model.files import write_atomically
from evaclip_model.training import config as training
from tasks.artifacts.artifact import Made
from tasks.process.child import run_supervised
from tasks.process.cluster import Program, job_name
from tasks.process.launch import (
    WORKER,
    count_gpus,
    default_ranks,
    rank_environment,
    read_hostfile,
    start_command,
)
from tasks.progress import Report, format_duration
from tasks.train.config import Launch

RATE_STEPS = 20
"""Steps that speeds are means of."""
MAX_LINE_BYTES = 8192
"""Of one line of metrics, generously."""
LOG_FILE = "train.log"
GRACE_S = 20.0
"""Time for the ranks to save a checkpoint between SIGTERM and SIGKILL."""
MAX_IDLE_RESTARTS = 2
"""Restarts in a row without a single new step before a run is given up on."""
_LOG_TAIL = 2000


@dataclass
class Follower:
    """Reads metrics and log as they grow; says how far training is, or why its job waits."""

    config: training.TrainConfig
    metrics: Path
    report: Report
    step: int = 0
    _recent: list[dict[str, Any]] = field(default_factory=list)
    _wait: str = ""

    def report_newest(self) -> None:
        """Report the newest step, or why a cluster's job waits, if that is new."""
        rows = last_rows(self.metrics, RATE_STEPS)
        if rows and rows != self._recent:
            self._recent, self.step = rows, rows[-1]["step"]
            self.report_event(describe_step(rows, self.config.steps))
        said = b"".join(_last_lines(self.metrics.with_name(LOG_FILE), _LOG_TAIL)[-1:])
        if said.startswith(f"job {job_name(self.metrics.parent)}: ".encode()):
            before, self._wait = self._wait, said.decode(errors="replace")
            if self._wait != before:
                self.report_event(self._wait)

    def report_event(self, what: str) -> None:
        self.report(self.step, self.config.steps, what)


def describe_step(rows: Sequence[Mapping[str, Any]], steps: int) -> str:
    """Loss, speed, the figures that go wrong first, time left, and what is out of order."""
    newest = rows[-1]
    seconds, waited = _mean_of(rows, "step_s"), _mean_of(rows, "data_wait_s")
    shown = {
        "loss {:.3f}": newest.get("loss"),
        "{:,.0f} images/s": _mean_of(rows, "images_per_second"),
        "MFU {:.0%}": _mean_of(rows, "mfu"),
        "logit scale {:.1f}": newest.get("logit_scale"),
        "grad norm {:.3g}": newest.get("grad_norm"),
        "data wait {:.0%}": waited / seconds if waited is not None and seconds else None,
    }
    parts = [form.format(value) for form, value in shown.items() if value is not None]
    if seconds is not None:
        parts.append(f"{format_duration((steps - newest['step']) * seconds)} left")
    return "  ".join([*parts, *list_notes(rows)])


def list_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Irregularities in these rows: spikes, skipped steps, rollbacks, a slow rank."""
    found = []
    if spikes := [row["step"] for row in rows if row.get("spike")]:
        found.append(f"spike at step {spikes[-1]:,}")
    if lost := sum(row.get("taken", 1) == 0 for row in rows):
        found.append(f"{lost} of {len(rows)} steps not taken")
    if rows[-1].get("rollbacks"):
        found.append(f"went back {rows[-1]['rollbacks']} times")
    slow = Counter(row["slow_rank"] for row in rows if row.get("slow_rank") is not None)
    rank, count = slow.most_common(1)[0] if slow else (0, 0)
    if 2 * count > len(rows):
        found.append(f"rank {rank} keeps the others waiting")
    return found


def last_rows(metrics: Path, count: int) -> list[dict[str, Any]]:
    """The newest whole lines about steps, oldest first."""
    return [json.loads(line) for line in _last_lines(metrics, MAX_LINE_BYTES * count)[-count:]]


def _last_lines(path: Path, size: int) -> list[bytes]:
    """The whole lines among the last bytes, `size` of them."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - size)
            file.seek(start)
            return file.read().split(b"\n")[1 if start else 0 : -1]
    except FileNotFoundError:  # cut back at this moment, or not begun
        return []


def _mean_of(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if isinstance(row.get(name), int | float)]
    return sum(values) / len(values) if values else None


class TrainingCrashed(RuntimeError):
    """The ranks died again and again without a reason of the user's making; the log's end is in."""


class Inputs(NamedTuple):
    start_from: Path
    """Folder of the model to start from."""
    shards: Path
    """`shards.json` of the dataset version."""
    teachers: tuple[Path, ...] = ()
    """Folders of the features of the stage's teachers."""


def train_model(
    config: training.TrainConfig, inputs: Inputs, out: Path, launch: Launch, report: Report
) -> Made:
    """Train to the end, from the newest checkpoint in `out` if a killed run left one; on this
    machine each rank gets an equal part of its cores.

    Raises:
        InputError: the trainer found a mistake of the user's, the loss diverged, memory does not
            suffice for half as many pairs at once either, or what starts the ranks is not there.
        TrainingCrashed: the ranks end without making progress.
    """
    config = config.fit_to_shards(inputs.shards)
    if not (out / training.RESULT_FILE).is_file():
        _run_training(
            Follower(config, out.resolve() / training.METRICS_FILE, report), inputs, launch
        )
    result = json.loads((out / training.RESULT_FILE).read_text())
    report(config.steps, config.steps, f"loss {result['final_loss']:.3f}")
    counts = {name: result[name] for name in ("steps", "samples_seen", "final_loss", "seconds")}
    drawn = {f"{name}.samples": count for name, count in result["source_samples"].items()}
    bad = {f"bad.{reason}": count for reason, count in result["bad_samples"].items()}
    kept = [out / name for name in (training.JOB_FILE, training.METRICS_FILE, training.RESULT_FILE)]
    weights = [
        file
        for name in (training.MODEL_FOLDER, training.EMA_FOLDER)
        for file in sorted((out / name).glob("*"))
    ]
    return Made({**counts, **drawn, **bad}, (*kept, *weights))


def try_out(
    config: training.TrainConfig, inputs: Inputs, out: Path, launch: Launch, report: Report
) -> dict[str, Any]:
    """Start the ranks for one step that is thrown away; nothing but `out` is written to. Returns
    what the trainer's `dry_run.json` says; raises as `train_model`."""
    config = config.fit_to_shards(inputs.shards)
    follower = Follower(config, out.resolve() / training.METRICS_FILE, report)
    status = _start_ranks(follower, inputs, launch, dry_run=True)
    if not (out / training.DRY_RUN_FILE).is_file():
        raise TrainingCrashed(
            f"training stage '{config.name}' ended with status {status} in its first step; "
            f"{_log_end(out)}"
        )
    found: dict[str, Any] = json.loads((out / training.DRY_RUN_FILE).read_text())
    return found


def _run_training(follower: Follower, inputs: Inputs, launch: Launch) -> None:
    config, out, idle = follower.config, follower.metrics.parent, 0
    smaller: Launch | None = None
    while idle <= MAX_IDLE_RESTARTS:
        before, killed = follower.step, kernel_kills()
        # Anew every time: the machine may have lost a GPU.
        status = _start_ranks(follower, inputs, smaller or launch)
        if (out / training.RESULT_FILE).is_file():
            return
        if (out / training.MEMORY_FILE).is_file() or kernel_kills() > killed:
            smaller = _with_smaller_parts(config, launch, tried=smaller)
            follower.report_event(
                f"memory ran out: training continues with a micro-batch of {smaller.micro_batch}"
            )
            continue
        stopped = (out / training.RESUMABLE_FILE).is_file()
        cause = "a signal stopped training" if stopped else f"training ended with status {status}"
        follower.report_event(f"{cause}: it continues from the newest checkpoint")
        idle = 0 if follower.step > before else idle + 1
    stacks = ", ".join(sorted(path.name for path in out.glob("stacks-*.txt")))
    raise TrainingCrashed(
        f"training stage '{config.name}' ended {idle} times with status {status} and no new step"
        f"{f' ({stacks} say where it hung)' if stacks else ''}; {_log_end(out)}"
    )


def _with_smaller_parts(
    config: training.TrainConfig, launch: Launch, tried: Launch | None
) -> Launch:
    """`launch` with half as many pairs of a rank in memory at once; InputError: that was `tried`,
    or the number is odd."""
    share = -(-config.global_batch // _this_machine(config, launch).all_ranks)
    pairs = min((tried or launch).micro_batch or share, share)
    if tried is not None or pairs % 2:
        raise InputError(
            f"training stage '{config.name}': a micro-batch of {pairs} does not fit into memory: "
            "set EVACLIP_MICRO_BATCH to less (a divisor of its share of the batch, "
            f"{share}), use more ranks, or grad_checkpointing in the recipe"
        )
    return launch.model_copy(update={"micro_batch": pairs // 2})


def kernel_kills(counters: Path = Path("/proc/vmstat")) -> int:
    """Processes that this machine's kernel has killed for memory since it started; 0 where it does
    not count. A killed rank says nothing itself, and launchers do not hand on how it died."""
    try:
        lines = counters.read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def _log_end(out: Path) -> str:
    return f"the end of {out / LOG_FILE}:\n{_read_text(out / LOG_FILE)[-_LOG_TAIL:]}"


def _start_ranks(
    follower: Follower, inputs: Inputs, launch: Launch, *, dry_run: bool = False
) -> int:
    """Run the ranks once, to whatever end; returns the status of what started them. InputError: the
    trainer left a sentence for the user."""
    config, out = follower.config, follower.metrics.parent
    here = _this_machine(config, launch)
    job = out / training.JOB_FILE
    content = _make_job(config, inputs, out, launch, here).model_copy(update={"dry_run": dry_run})
    write_atomically(job, content.model_dump_json(indent=1) + "\n")
    for name in (training.ERROR_FILE, training.RESUMABLE_FILE, training.MEMORY_FILE):
        (out / name).unlink(missing_ok=True)
    with TemporaryDirectory(prefix="evaclip-ranks-") as private:
        env = rank_environment(os.environ, here.ranks, here.cores, Path(private) / "store")
        status = run_supervised(
            start_command(launch, trainer_program(job, inputs), here.ranks),
            log=out / LOG_FILE,
            grace_s=GRACE_S,
            env=env if here.is_alone else os.environ,
            poll=follower.report_newest,
        )
    follower.report_newest()
    if (out / training.ERROR_FILE).is_file():
        raise InputError(f"training stage '{config.name}': {_read_text(out / training.ERROR_FILE)}")
    return status


def trainer_program(job: Path, inputs: Inputs) -> Program:
    """The program of the ranks of a training."""
    reads = tuple(one.resolve() for one in (inputs.start_from, inputs.shards, *inputs.teachers))
    ends = (job.with_name(name) for name in (training.RESULT_FILE, training.ERROR_FILE))
    over = " || ".join(f"[ -e {quote(str(end))} ]" for end in ends)
    return Program(WORKER, job, job.with_name(LOG_FILE), reads, over)


class _ThisMachine(NamedTuple):
    cores: int
    gpus: int
    ranks: int
    is_alone: bool
    """Whether all ranks run here, so that its cores say what each gets."""
    all_ranks: int


def _this_machine(config: training.TrainConfig, launch: Launch) -> _ThisMachine:
    cores = len(os.sched_getaffinity(0))
    gpus = count_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
    ranks, machines = launch.ranks or default_ranks(cores, gpus), launch.nodes
    if launch.hostfile is not None and launch.launcher == "deepspeed":
        hosts = read_hostfile(launch.hostfile)
        ranks, machines = max(hosts.values()), len(hosts)
    is_alone = machines == 1 and launch.launcher in ("auto", "torchrun", "deepspeed")
    return _ThisMachine(cores, gpus, ranks, is_alone, ranks * machines)


def _make_job(
    config: training.TrainConfig, inputs: Inputs, out: Path, launch: Launch, here: _ThisMachine
) -> training.TrainJob:
    handed_on = {"micro_batch", "compile", "watchdog_s", "profile_steps", "tensorboard"}
    chosen: dict[str, Any] = {
        **launch.model_dump(include={*handed_on, "read_workers"}),
        "engine": launch.train_engine,
        "checkpoints": launch.checkpoint_url and f"{launch.checkpoint_url.rstrip('/')}/{out.name}",
        "probe": launch.probe and launch.probe.resolve(),
    }
    fitting: dict[str, Any] = {}
    if here.is_alone:
        fitting = {"threads": max(1, here.cores // here.ranks)}
    return training.TrainJob(
        train=config,
        start_from=inputs.start_from.resolve(),
        shards=inputs.shards.resolve(),
        teachers=tuple(one.resolve() for one in inputs.teachers),
        run_dir=out,
        **{**fitting, **{name: value for name, value in chosen.items() if value is not None}},
    )


def _read_text(path: Path) -> str:
    return escape_control(path.read_text(errors="replace")).strip()
