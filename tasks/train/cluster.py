"""A training run as a job of Slurm or Kubernetes: its script, and the commands that handle it.

Covers: filling in a job template, submitting, asking whether a job is over, cancelling: all as
values and pure functions.
Not here: doing it (submit.py); what the ranks make of Slurm's variables
(evaclip_model/training/worker.py).
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jinja2 import Environment, StrictUndefined, TemplateError

from evaclip_model.errors import InputError

Kind = Literal["slurm", "kubernetes"]
INFRA = Path(__file__).resolve().parents[2] / "infra"
_NOT_IN_A_LABEL = re.compile(r"[^a-z0-9-]+")


@dataclass(frozen=True)
class Cluster:
    """The commands of one kind of cluster; `{script}` and `{name}` of the job are filled in.

    A job is known by its name, which is that of the run's folder: no id can be lost in a crash.
    """

    template: Path
    """What a job is made from when the user names no other."""
    script: str
    """Name of the job's file in the run's folder."""
    submit: tuple[tuple[str, ...], ...]
    """One after another: clears away what is left of an ended job of that name, and submits."""
    state: tuple[str, ...]
    """Prints words about the job; nothing when there is no such job."""
    ended: frozenset[str]
    """Words that say the job is there, but nothing of it runs or will run again."""
    cancel: tuple[str, ...]
    """Ends the job, SIGTERM first."""
    beside: frozenset[str] = frozenset()
    """Words that are not about the job, but about what is submitted with it."""

    @property
    def tools(self) -> frozenset[str]:
        """Programs that must be installed where the job is submitted."""
        return frozenset(words[0] for words in (*self.submit, self.state, self.cancel))

    def is_over(self, said: str) -> bool:
        """Whether nothing of the job runs or will run, by what `state` printed."""
        words = set(said.split()) - self.beside
        return not words or not self.ended.isdisjoint(words)


_DELETE = ("kubectl", "delete", "--filename={script}", "--ignore-not-found", "--wait")
CLUSTERS: Mapping[Kind, Cluster] = {
    "slurm": Cluster(
        template=INFRA / "slurm" / "train.sbatch",
        script="job.sbatch",
        submit=(("sbatch", "--parsable", "{script}"),),
        # Lists what waits, runs or is ending; a requeued job waits again, under the same name.
        state=("squeue", "--noheader", "--format=%T", "--name={name}"),
        ended=frozenset(),
        cancel=("scancel", "--name={name}"),
    ),
    "kubernetes": Cluster(
        template=INFRA / "kubernetes" / "train-job.yaml",
        script="job.yaml",
        submit=(_DELETE, ("kubectl", "apply", "--filename={script}")),
        # A Job, a JobSet or a TrainJob, alone or in a list with its Service.
        state=(
            *("kubectl", "get", "--filename={script}", "--ignore-not-found"),
            "--output=jsonpath={{.kind}} {{.items[*].kind}} {{.status.conditions[*].type}} "
            "{{.items[*].status.conditions[*].type}}",
        ),
        ended=frozenset({"Complete", "Completed", "Failed"}),
        cancel=_DELETE,
        beside=frozenset({"List", "Service"}),
    ),
}


def job_name(run_dir: Path) -> str:
    """The run's folder as a name that Slurm and Kubernetes take: a DNS label, at most 33 long.

    The folder's own name says which artifact it is; the rest tells copies under other roots apart.
    """
    digest = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()
    readable = _NOT_IN_A_LABEL.sub("-", run_dir.name.lower())[:16].strip("-")
    return f"evaclip-{readable}-{digest[:8]}"


def job_script(
    template: Path, *, job: Path, reads: tuple[Path, ...], log: Path, ranks: int, nodes: int
) -> str:
    """The job's script from its template.

    Args:
        job: the trainer's job file.
        reads: what the trainer reads; the folder around it and the job file must be mounted.
        ranks: processes of each machine.

    Raises:
        InputError: the template cannot be read, or names something that is not there to fill in.
    """
    places: dict[str, str | int] = {
        "name": job_name(job.parent),
        "job": str(job),
        "run_dir": str(job.parent),
        "root": os.path.commonpath([job.parent, *reads]),
        "log": str(log),
        "python": sys.executable,
        "ranks": ranks,
        "nodes": nodes,
    }
    strict = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    strict.filters["quote"] = shlex.quote  # a shell's word; `tojson` is a YAML value
    try:
        return strict.from_string(template.read_text()).render(places)
    except (OSError, UnicodeDecodeError, TemplateError) as error:
        raise InputError(
            f"the job template {template} cannot be used ({error}): it is filled in with "
            f"{', '.join('{{ ' + name + ' }}' for name in places)}"
        ) from None
