"""Starting the ranks of a job, whatever it is: settings, command lines and environments; running
those that share files alone: every rank does its share of a list, by its place among them, so that
none waits for another. Such a rank says how far it is in a file beside the job, and leaves a
sentence for the user if it gives up: whoever started the ranks reads those.

Not here: running ranks that train (tasks/train/train.py); jobs of Slurm and Kubernetes
(cluster.py).

Every rank gets the path of the job file and no other argument: launchers mix their options with
those of what they launch.
"""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from subprocess import TimeoutExpired
from typing import ClassVar, Literal, Self, TypeVar

from pydantic import Field, field_validator, model_validator

from evaclip_model.config import Config
from evaclip_model.errors import InputError, escape_control
from evaclip_model.files import write_atomically
from evaclip_model.ports import find_free_port
from evaclip_model.training.config import RANK_STORE
from evaclip_model.training.worker import place_from_slurm
from tasks.process.child import refuse_full_disk, run_supervised, start_supervised
from tasks.process.cluster import CLUSTERS, Program, job_name, job_script

WORKER = "evaclip_model.training.worker"
CLUSTER_LOOK_S = 10.0
"""Between two questions to the cluster."""
LOOPBACK = "127.0.0.1"
CPU_RANKS = 2
"""Ranks on a machine without GPUs: the least that shards anything, and few for a laptop."""


_HOST = re.compile(r"(\S+)\s+slots=(\d+)\s*")
Launcher = Literal["auto", "torchrun", "deepspeed", "slurm", "kubernetes", "external"]
GRACE_S = 2.0
"""A rank has nothing to save: what it has finished is in its place."""
LAUNCHED_GRACE_S = 20.0
"""For the launcher to end ranks elsewhere."""
POLL_S, LAUNCHED_POLL_S = 0.2, 2.0
LOG = "ranks.log"
MAX_IDLE_STARTS = 2
"""Times in a row that ranks may end without another file before their stage fails."""
_LOG_TAIL = 1500
"""Bytes of a log that say why."""


class RankLaunch(Config):
    """Settings of starting ranks; the field `x` is read from the environment as `EVACLIP_X`, or
    what else the class has for a prefix."""

    PREFIX: ClassVar[str] = "EVACLIP_"
    launcher: Launcher = "auto"
    """What starts ranks. auto: plain processes, or torchrun for several that train; deepspeed: its
    launcher over the machines of `hostfile`; slurm, kubernetes: a job from `job_template`,
    submitted and followed; external: your own `submit_command`."""
    ranks: int = Field(0, ge=0)
    """Processes of each machine; 0: one a GPU, or on a CPU with two cores two that train."""
    nodes: int = Field(1, gt=0)
    """Machines."""
    rendezvous: str | None = None
    """Where torchrun's machines meet, `host:port` of the first of them."""
    hostfile: Path | None = None
    """Machines of the deepspeed launcher, one a line: `name slots=PROCESSES`."""
    job_template: Path | None = None
    """Your own copy of infra/slurm/train.sbatch or of one of infra/kubernetes/train-*.yaml."""
    submit_command: str | None = None
    """Starts all ranks and ends when they do. `{job}`, `{run_dir}`, `{ranks}`, `{nodes}`,
    `{module}` are filled in; every rank must run `python -m {module} {job}`."""

    @property
    def is_local(self) -> bool:
        """Return whether all ranks are of this machine, and no program need start them."""
        return self.launcher in ("auto", "torchrun") and self.nodes == 1

    @field_validator("rendezvous")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        if value is not None and re.fullmatch(r"\S+:\d+", value) is None:
            raise ValueError("must be host:port")
        return value

    @model_validator(mode="after")
    def _fits_the_launcher(self) -> Self:
        of, many = self.PREFIX, self.nodes > 1
        chosen = f"{of}LAUNCHER={self.launcher}"
        wrong = None
        match self.launcher:
            case "auto" if many:
                wrong = f"{of}NODES is above 1: say what starts them by {of}LAUNCHER"
            case "torchrun" if many and self.rendezvous is None:
                wrong = f"{of}NODES is above 1: torchrun needs {of}RENDEZVOUS=host:port too"
            case "deepspeed" if self.hostfile is None:
                wrong = f"{chosen} needs {of}HOSTFILE=path"
            case "deepspeed" if self.ranks or many:
                wrong = (
                    f"{chosen} takes machines and processes from {of}HOSTFILE: leave "
                    f"{of}RANKS and {of}NODES unset"
                )
            case "external" if self.submit_command is None:
                wrong = f"{chosen} needs {of}SUBMIT_COMMAND"
            case "slurm" | "kubernetes" | "external" if not self.ranks:
                wrong = (
                    f"{chosen} needs {of}RANKS, the processes of each machine (one a GPU): "
                    "this machine's GPUs say nothing about the others"
                )
        if wrong:
            raise ValueError(wrong)
        return self


def default_ranks(cores: int, gpus: int) -> int:
    """Ranks when no number is set: one a GPU, or two on a CPU that has the cores. Any number can
    share a batch, so that a machine that lost a GPU goes on with the others."""
    return gpus or min(CPU_RANKS, cores)


def count_gpus(visible: str | None, devices: Path = Path("/dev")) -> int:
    """GPUs that `visible` (CUDA_VISIBLE_DEVICES) leaves of this machine's; torch is slow to ask."""
    if visible is not None:
        return len([one for one in visible.split(",") if one.strip() not in ("", "-1")])
    return len(list(devices.glob("nvidia[0-9]*")))


def start_command(launch: RankLaunch, program: Program, ranks: int) -> list[str]:
    """The command that starts ranks, `ranks` of each machine, and ends when they do; files that it
    needs are written. InputError: a program, the hostfile or the job template is missing or wrong.
    """
    folder = program.job.parent
    match launch.launcher:
        case "auto" | "torchrun":
            words = torchrun_command(program, launch, ranks)
            if launch.nodes > 1:
                # The other machines' part of the ranks, until the stage is over.
                joining = f"until {program.over}; do {shlex.join(words)}; sleep 5; done"
                write_atomically(folder / "join.sh", f"#!/bin/sh\n{joining}\n")
            return words
        case "external":
            words = external_command(program, launch)
            _require_program(launch, words[0])
            return words
        case "deepspeed":
            assert launch.hostfile is not None, "the launch's settings refuse it"
            hosts = read_hostfile(launch.hostfile)
            if len(hosts) > 1:
                _require_program(launch, "pdsh")
            return deepspeed_command(program, launch.hostfile, hosts, find_free_port())
        case "slurm" | "kubernetes" as kind:
            cluster = CLUSTERS[kind]
            for tool in sorted(cluster.tools):
                _require_program(launch, tool)
            template = launch.job_template or cluster.template
            script, name = folder / cluster.script, job_name(folder)
            text = job_script(template, program, ranks=launch.ranks, nodes=launch.nodes)
            write_atomically(script, text)
            submit = [sys.executable, "-m", "tasks.process.cluster"]
            return [*submit, kind, str(script), name, str(CLUSTER_LOOK_S)]


def torchrun_command(program: Program, launch: RankLaunch, ranks: int) -> list[str]:
    """The command that every machine runs: `ranks` ranks each, which meet at the rendezvous; on a
    single machine torchrun without a port, or one process."""
    words = [program.module, str(program.job)]
    if launch.nodes > 1:
        # The run's folder as id: another run at the same meeting point is not joined.
        folder = program.job.parent.name
        meeting = [f"--rdzv-endpoint={launch.rendezvous}", f"--rdzv-id={folder}"]
    elif ranks == 1:
        return [sys.executable, "-m", *words]
    else:
        # Without an endpoint the agent's store is a temporary file that only this user can open.
        meeting = ["--rdzv-conf=store_type=file", f"--local-addr={LOOPBACK}"]
    run = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", *meeting]
    return [*run, f"--nnodes={launch.nodes}", f"--nproc-per-node={ranks}", "-m", *words]


def deepspeed_command(
    program: Program, hostfile: Path, hosts: Mapping[str, int], port: int
) -> list[str]:
    """The deepspeed launcher over `hosts`; a single one is taken to be this machine, without ssh.
    Ranks meet on `port` of the first machine."""
    # It would put `--local_rank=N` before the job file.
    words = ["--module", program.module, str(program.job)]
    plain = ["--no_local_rank", f"--master_port={port}", *words]
    here = ["--no_ssh_check", f"--master_addr={LOOPBACK}"] if len(hosts) == 1 else []
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={hostfile}"]
    return [*runner, *here, *plain]


def read_hostfile(path: Path) -> dict[str, int]:
    """Machines of a deepspeed hostfile and the processes of each, in their order. InputError: it
    cannot be read (the launcher itself would go on with this machine alone), or a line is not
    `name slots=N`."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise InputError(
            f"the hostfile {path} cannot be read ({error.strerror}): give a file with lines "
            "`name slots=PROCESSES`"
        ) from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not (text := line.partition("#")[0].strip()):
            continue
        found = _HOST.fullmatch(text)
        if found is None or not int(found[2]) or found[1] in hosts:
            raise InputError(
                f"{path}, line {number}: '{text}' must be `name slots=PROCESSES`, each name once"
            )
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise InputError(f"{path} names no machine: write a line `name slots=PROCESSES` for each")
    return hosts


def external_command(program: Program, launch: RankLaunch) -> list[str]:
    """The user's own command with its places filled in; InputError: it names others, or is none."""
    job, module, setting = program.job, program.module, f"{launch.PREFIX}SUBMIT_COMMAND"
    places = {"job": job, "run_dir": job.parent, "ranks": launch.ranks, "nodes": launch.nodes}
    if module != WORKER and "{module}" not in (launch.submit_command or ""):
        raise InputError(
            f"{setting} has no place {{module}}, and {module} is to be started: have "
            "every rank run `python -m {module} {job}`, or set EVACLIP_EVALUATE_HERE=true"
        )
    try:
        words = [
            word.format(**places, module=module)
            for word in shlex.split(launch.submit_command or "")
        ]
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(
            f"{setting} is not a command with the placeholders {{job}}, {{run_dir}}, "
            f"{{ranks}}, {{nodes}}, {{module}} ({error}): write a brace that is meant as itself "
            "twice"
        ) from None
    if not words:
        raise InputError(f"{setting} is empty: give the command that starts all ranks")
    return words


def rank_environment(
    base: Mapping[str, str], ranks: int, cores: int, store: Path
) -> dict[str, str]:
    """`base` for the ranks of this machine: its cores shared out, nothing that others can reach.
    `store` is a file that is not there yet, in a folder of this user's alone."""
    return {
        "NCCL_SOCKET_IFNAME": "lo",
        **base,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": str(max(1, cores // ranks)),
        "PYTHONUNBUFFERED": "1",
        RANK_STORE: str(store),
        # torchrun would else open a TCPStore, on all networks, for the ranks to use
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }


def _require_program(launch: RankLaunch, program: str) -> None:
    if shutil.which(program) is None:
        raise InputError(
            f"{launch.PREFIX}LAUNCHER={launch.launcher} needs the program '{program}', which is "
            "not on the PATH: install it, or choose another launcher"
        )


Work = TypeVar("Work", bound=Config)
Missing = TypeVar("Missing")


class RankState(Config):
    """Progress of a rank, for whoever started it."""

    done: int = 0
    """Samples, or shards where those are counted."""
    detail: str = ""
    failed: Mapping[str, str] = {}
    """What cannot be done -> the reason, once the rank is done."""
    share_of_peak: float | None = None
    """Of what its device can compute, where that is known."""


def iterate_starts(
    find_missing: Callable[[], Missing], count: Callable[[Missing], int], folder: Path
) -> Iterator[Missing]:
    """Yield what is missing until nothing is: whoever asks for the next has had ranks started on
    the one before. InputError with the end of the newest log in `folder`, OSError if that speaks of
    a full disk, when they ended again and again without lessening the `count` of it."""
    idle, before = 0, -1
    while missing := find_missing():
        left = count(missing)
        idle = idle + 1 if left == before else 0
        if idle > MAX_IDLE_STARTS:
            said = f"the ranks ended {idle} times without another file"
            for log in sorted(folder.glob("*.log"), key=lambda file: -file.stat().st_mtime)[:1]:
                refuse_full_disk(log)
                text = escape_control(log.read_text(errors="replace"))
                said += f"; the end of their log, {log}:\n{text[-_LOG_TAIL:]}"
            raise InputError(said)
        before = left
        yield missing


def run_ranks(
    module: str,
    work: Config,
    job: Path,
    ranks: int,
    watch: Callable[[Sequence[RankState]], None],
    launch: RankLaunch | None = None,
    reads: tuple[Path, ...] = (),
    on_gpus: bool = True,
) -> None:
    """Run every rank to its end, whether it succeeds or fails, its log beside the file `job`, which
    tells them the `work` and other machines, while it is there, that it is not over; InputError
    with the sentence of one that gave up. `watch` gets their states while they work, and at the
    end. A `launch` over machines starts its own number of ranks, each with a GPU if `on_gpus`;
    `reads` must be mounted there."""
    for old in (*job.parent.glob("state-*.json"), *job.parent.glob("message-*.txt")):
        old.unlink()
    write_atomically(job, work.model_dump_json())

    def look() -> None:
        states = sorted(job.parent.glob("state-*.json"))
        watch([RankState.model_validate_json(state.read_bytes()) for state in states])
        for message in sorted(job.parent.glob("message-*.txt")):
            raise InputError(message.read_text())

    try:
        if launch is None or launch.is_local:
            _run_here(module, job, ranks, look)
        else:
            log = job.with_name(LOG)
            over = f"[ ! -e {shlex.quote(str(job))} ]"
            program = Program(module, job, log, reads, over, on_gpus)
            command = start_command(launch, program, launch.ranks)
            run_supervised(
                command, log=log, grace_s=LAUNCHED_GRACE_S, poll=look, poll_s=LAUNCHED_POLL_S
            )
        look()
    finally:
        job.unlink()


def _run_here(module: str, job: Path, ranks: int, look: Callable[[], None]) -> None:
    """All ranks on this machine, on one thread each."""
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks)}
    command = [sys.executable, "-m", module, str(job)]
    with ExitStack() as stack:
        waiting = []
        for rank in range(ranks):
            log, env = job.with_name(f"rank-{rank}.log"), {**shared, "RANK": str(rank)}
            child = start_supervised(command, log=log, grace_s=GRACE_S, env=env)
            waiting.append(stack.enter_context(child))
        while waiting:
            with suppress(TimeoutExpired):
                waiting[0].wait(POLL_S)
                waiting.pop(0)
            look()


def run_share(
    form: type[Work], do_share: Callable[[Work, int, int, Callable[[RankState], None]], None]
) -> int:
    """Main program of a rank, which gets the work, its number, how many there are, and what says
    how far it is: its exit status, 2 after a user's mistake."""
    job, place = Path(sys.argv[1]), {**os.environ, **place_from_slurm(os.environ)}
    rank = int(place["RANK"])

    def say(state: RankState) -> None:
        file = job.with_name(f"state-{rank}.json")
        write_atomically(file, state.model_dump_json(), sync=False)

    try:
        do_share(form.model_validate_json(job.read_bytes()), rank, int(place["WORLD_SIZE"]), say)
    except InputError as error:
        write_atomically(job.with_name(f"message-{rank}.txt"), str(error))
        return 2
    return 0
