"""Ranks as a job of Slurm or Kubernetes: its script, the commands that handle it, and the process
that submits it and stays until it is over, `python -m tasks.process.cluster KIND SCRIPT NAME
SECONDS`; it goes on with a job of that name that an earlier process submitted and could not end.

Not here: what the ranks make of Slurm's variables (evaclip_model/training/worker.py); what came of
the job: that is in the run's folder.

Exit codes: 0 the job is over, however it ended; 75 it was cancelled on SIGTERM; 1 the cluster's
command fails, with its own words in the log.
"""

import hashlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, cast

from jinja2 import Environment, StrictUndefined, TemplateError
from pydantic import AfterValidator, TypeAdapter

from evaclip_model.config import Config
from evaclip_model.errors import InputError

Kind = Literal["slurm", "kubernetes"]
INFRA = Path(__file__).resolve().parents[2] / "infra"
_NOT_IN_A_LABEL = re.compile(r"[^a-z0-9-]+")
OVER, CANCELLED, FAILED = 0, 75, 1
MAX_SILENT_S = 1800.0
"""How long the cluster may leave questions unanswered; its controller may be restarted."""
MAX_HOPELESS_S = 1800.0
"""How long a job may wait for what does not go away by itself: a person may mend it meanwhile."""
COMMAND_S = 120.0


class Cluster(Config):
    """The commands of one kind of cluster; `{script}` and `{name}` of the job are filled in. The
    name is made from the run's folder: no id can be lost in a crash."""

    template: Annotated[Path, AfterValidator(lambda path: INFRA / path)]
    """What a job is made from when the user names no other, within `infra/`."""
    script: str
    """Name of the job's file in the run's folder."""
    submit: tuple[tuple[str, ...], ...]
    """One after another: clears away what is left of an ended job of that name, and submits."""
    state: tuple[str, ...]
    """Prints words about the job; nothing when there is no such job."""
    beside: frozenset[str] = frozenset()
    """Of these words, those that are about what is submitted with the job."""
    ended: frozenset[str] = frozenset()
    """Words that say the job is there, but nothing of it runs or will run again."""
    reason: tuple[str, ...]
    """Prints why the job waits; nothing while it does not."""
    hopeless: frozenset[str]
    """Words of a reason that does not go away by itself."""
    cancel: tuple[str, ...]
    """Ends the job, SIGTERM first."""

    @property
    def tools(self) -> frozenset[str]:
        """Programs that must be installed where the job is submitted."""
        commands = (*self.submit, self.state, self.reason, self.cancel)
        return frozenset(words[0] for words in commands)

    def is_over(self, said: str) -> bool:
        """Return whether nothing of the job runs or will run, by what `state` printed."""
        words = set(said.split()) - self.beside
        return not words or not self.ended.isdisjoint(words)


CLUSTERS: Mapping[Kind, Cluster] = TypeAdapter(dict[Kind, Cluster]).validate_python(
    tomllib.loads(Path(__file__).with_name("clusters.toml").read_text())
)


def job_name(run_dir: Path) -> str:
    """A name that Slurm and Kubernetes take, a DNS label of at most 33 letters: the run's folder
    says which artifact it is, a digest of its path tells copies under other roots apart."""
    digest = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()
    readable = _NOT_IN_A_LABEL.sub("-", run_dir.name.lower())[:16].strip("-")
    return f"evaclip-{readable}-{digest[:8]}"


class Program(NamedTuple):
    """The program of every rank, `python -m MODULE JOB`, and what a launcher must know besides."""

    module: str
    job: Path
    log: Path
    reads: tuple[Path, ...] = ()
    """What must be mounted besides the job's folder."""
    over: str = ""
    """A shell's condition that the work is over."""
    on_gpus: bool = True
    """Whether a rank needs a GPU."""


def job_script(template: Path, program: Program, *, ranks: int, nodes: int) -> str:
    """The job's script from its template; `ranks` are the processes of each machine. InputError:
    the template cannot be read, names something that is not there to fill in, or starts another
    program."""
    job = program.job
    places: dict[str, str | int] = {
        "name": job_name(job.parent),
        "module": program.module,
        "job": str(job),
        "run_dir": str(job.parent),
        "root": os.path.commonpath([job.parent, *program.reads]),
        "log": str(program.log),
        "python": sys.executable,
        "ranks": ranks,
        "gpus": ranks if program.on_gpus else 0,
        "nodes": nodes,
    }
    strict = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    strict.filters["quote"] = shlex.quote  # a shell's word; `tojson` is a YAML value
    try:
        text = strict.from_string(template.read_text()).render(places)
    except (OSError, UnicodeDecodeError, TemplateError) as error:
        raise InputError(
            f"the job template {template} cannot be used ({error}): it is filled in with "
            f"{', '.join('{{ ' + name + ' }}' for name in places)}"
        ) from None
    if program.module not in text:
        raise InputError(
            f"the job template {template} does not start {program.module}: write {{{{ module }}}} "
            "where it names the program of the ranks"
        )
    return text


def main(arguments: Sequence[str]) -> int:
    """Submit and follow; returns the exit code."""
    kind, script, name, every_s = arguments
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    job = _Job(CLUSTERS[cast(Kind, kind)], script, name)
    try:
        if job.is_over():
            for command in job.cluster.submit:
                job.run_command(command)
        if job.follow_job(stop, float(every_s)):
            return OVER
        job.cancel_job()
    except (OSError, subprocess.SubprocessError, InputError) as error:
        said = getattr(error, "stderr", None) or ""
        sys.stderr.write(f"{error}: {said.strip()}\n")
        return FAILED
    return CANCELLED


@dataclass(frozen=True)
class _Job:
    cluster: Cluster
    script: str
    name: str

    def is_over(self) -> bool:
        return self.cluster.is_over(self.run_command(self.cluster.state))

    def follow_job(self, stop: threading.Event, every_s: float) -> bool:
        """Wait until the job is over (True) or `stop` is set (False); print why it waits, each time
        that the reason changes. InputError: it waited too long for what does not go away by itself
        and is cancelled."""
        answered = hoped = time.monotonic()
        waits = ""
        while not stop.is_set():
            try:
                if self.is_over():
                    return True
                before, waits = waits, " ".join(self.run_command(self.cluster.reason).split())
                if waits != before:
                    sys.stdout.write(f"job {self.name}: {waits or 'waits no more'}\n")
                    sys.stdout.flush()
                answered = time.monotonic()
                if self.cluster.hopeless.isdisjoint(waits.split()):
                    hoped = answered
            except subprocess.SubprocessError:
                if time.monotonic() - answered > MAX_SILENT_S:
                    raise
            if answered - hoped > MAX_HOPELESS_S:
                self.cancel_job()
                raise InputError(
                    f"job {self.name} waited for {MAX_HOPELESS_S:.0f} s and is "
                    f"cancelled ({waits}): mend that, and run the same command again"
                )
            stop.wait(every_s)
        return False

    def cancel_job(self) -> None:
        """Have the job ended, and stay until it is; if we are killed, the cluster ends it alone."""
        self.run_command(self.cluster.cancel)
        while not self.is_over():
            time.sleep(0.5)

    def run_command(self, command: Sequence[str]) -> str:
        return subprocess.run(
            [word.format(script=self.script, name=self.name) for word in command],
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            start_new_session=True,  # what stops us must not stop a submission half-way
        ).stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
