"""One step of the graph: a stage, its config, its inputs by role, and the work that makes it.

What decides the result is in the address; what only says how the work is done comes from the
profile when the step runs. Not here: which steps there are (graph.py), running them (runner.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from evaclip_model.config import Config
from flows.config.profile import Profile
from tasks.artifacts.artifact import Address, Artifact, Made, Stage, produce_artifact, read_artifact
from tasks.artifacts.root_store import fetch_artifact
from tasks.progress import Report

ABSENT = "absent"
"""Stands among a step's inputs for outside data that is not here: the step's address, and those of
all steps that follow, are not the ones that a run would have."""
Work = Callable[[Profile, Path, Report], Made]
"""Makes an artifact in a folder. All else that it needs is bound to it where the step is declared,
so that the type checker sees every argument."""


@dataclass(frozen=True)
class Record:
    """The things that a step's tracking run keeps besides its settings and its totals."""

    datasets: Mapping[str, Step | Artifact] = field(default_factory=dict)
    """Context (training, evaluation, …) -> input that is read as data in it."""
    outside: Callable[[Artifact], Sequence[Mapping[str, str]]] = lambda _: ()
    """Data that it read and no step made (`outside_dataset`), from what the step made."""
    files: tuple[str, ...] = ()
    metrics: str | None = None
    """File of the artifact that is sent while it grows."""


@dataclass(frozen=True, eq=False)
class Step:
    """One artifact of the graph, made or not."""

    root: Path
    stage: Stage
    config: Config
    inputs: Mapping[str, Input]
    """Role -> another step, an artifact that is finished, or the mark of outside data."""
    work: Work
    what: str = ""
    """How much it will make, for a person."""
    absent: Sequence[str] = ()
    """A sentence on everything from outside that it reads and that is not here."""
    record: Record = Record()
    title: str = ""
    expected_bytes: int = 0
    service: Callable[[], AbstractContextManager[None]] = nullcontext
    """What has to be up while it is made, such as the demo's web; nothing is made if it fails."""

    def __post_init__(self) -> None:
        if not self.title:
            object.__setattr__(self, "title", self.stage.name)

    @cached_property
    def address(self) -> Address:
        """The place where it is or will be; the product computes an address nowhere else."""
        parents = {role: digest_of(given) for role, given in self.inputs.items()}
        return Address.of(self.root, self.stage, self.config, parents)

    @cached_property
    def digest(self) -> str:
        return self.address.digest

    @cached_property
    def folder(self) -> Path:
        return self.address.folder

    @property
    def is_finished(self) -> bool:
        return self.address.is_finished

    def make_artifact(self, profile: Profile, report: Report) -> Artifact:
        with nullcontext() if self.is_finished else self.service():
            return produce_artifact(
                self.address, lambda out: self._work_on_inputs(profile, out, report), report
            )

    def _work_on_inputs(self, profile: Profile, out: Path, report: Report) -> Made:
        for given in self.inputs.values():
            if not isinstance(given, str):
                fetch_artifact(given.folder, report=report)
        return self.work(profile, out, report)

    @cached_property
    def is_settled(self) -> bool:
        return all(
            given.is_settled if isinstance(given, Step) else given != ABSENT
            for given in self.inputs.values()
        )


Input = Step | Artifact | str
Inputs = dict[str, Input]


def digest_of(given: Input) -> str:
    """Return what stands for an input in the digest of what is made from it."""
    return given if isinstance(given, str) else given.digest


def finished_artifact(given: Step | Artifact) -> Artifact:
    """An input's artifact; raises InputError where the step is not finished."""
    return read_artifact(given.folder) if isinstance(given, Step) else given


def walk_steps(*heads: Step | None) -> tuple[Step, ...]:
    """Every step that `heads` are made from, themselves included, once, in the order of work."""
    found: dict[str, Step] = {}

    def visit(step: Step) -> None:
        if step.digest in found:
            return
        for given in step.inputs.values():
            if isinstance(given, Step):
                visit(given)
        found[step.digest] = step

    for head in heads:
        if head is not None:
            visit(head)
    return tuple(found.values())
