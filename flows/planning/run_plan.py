"""The plan of a run, its fit to this machine, and a trial of one step of it. Not here: what data
and training cost (recipe_cost.py), checks of the machine alone (health_checks.py)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple, Self

import psutil

from evaclip_model.errors import InputError
from evaclip_model.reading.samples import SHARDS
from evaclip_model.reading.urls import find_working_copy
from evaclip_model.training.config import MODEL_FOLDER
from evaclip_model.training.cost import shown_tokens, stage_flops_per_sample
from flows.config.profile import Profile
from flows.config.recipe import Machines, Recipe, planned_stages
from flows.graph.graph import Graph
from flows.graph.step import Step, finished_artifact
from flows.planning.recipe_cost import GIB, cut_share, reader_bytes
from flows.reporting.terminal import summarise_counts
from tasks.artifacts.artifact import Role
from tasks.artifacts.root_store import fetch_artifact
from tasks.embed.config import FEATURES, TEACH
from tasks.process.launch import count_gpus, default_ranks
from tasks.progress import format_bytes, report_nothing
from tasks.tracking import SQLITE

SMALL_BYTES = 50_000_000  # reports, databases, what else a run leaves
Level = Literal["ok", "warn", "fail"]
CPU_FLOPS_PER_CORE = 20e9
"""fp32 matrix products of one core in the trainer, as on the two cores this was written on."""
CPU_DAYS = 30  # training on a CPU that takes longer than this is a mistake
ELSEWHERE = ("slurm", "kubernetes", "external", "deepspeed")
"""Launchers whose machines are others than the one that plans."""


class PlanRow(NamedTuple):
    title: str
    state: str
    """"there", "unfinished" or "to make"."""
    size: str
    digest: str
    """"not known" as long as something it is made from is not here."""


def make_plan(graph: Graph) -> list[PlanRow]:
    rows = []
    for step in graph.steps:
        size = summarise_counts(finished_artifact(step).counts) if step.is_finished else step.what
        digest = step.digest if step.is_settled else "not known"
        begun = step.folder.is_dir() and any(step.folder.iterdir())
        state = "there" if step.is_finished else "unfinished" if begun else "to make"
        rows.append(PlanRow(step.title, state, size, digest))
    return rows


def check_disk(graph: Graph) -> None:
    """Refuse a run where less is free than unfinished stages write at least."""
    root = graph.site.root
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the folder of all artifacts, {root}, cannot be made ({error.strerror}): "
            "set EVACLIP_ROOT to another one"
        ) from None
    needed, free = disk_bytes(graph), shutil.disk_usage(root).free
    if free < needed:
        raise InputError(
            f"the disk of {root} has {free / 1e9:.1f} GB free and this run needs about "
            f"{needed / 1e9:.1f} GB: free some, or set EVACLIP_ROOT to another disk"
        )


def disk_bytes(graph: Graph) -> int:
    """Return what the steps that are not finished write at least; of a root at a URL, here."""
    needed = [step.expected_bytes for step in graph.steps if not step.is_finished]
    if needed and find_working_copy(str(graph.site.root)) is not None:
        return SMALL_BYTES  # shards and checkpoints go to the URL as they are finished
    return sum(needed) + SMALL_BYTES if needed else 0


def plan_markdown(recipe: Recipe, graph: Graph) -> str:
    head = f"# Plan of {recipe.name}\n\n| stage | state | what | digest |\n|---|---|---|---|"
    rows = (f"| {r.title} | {r.state} | {r.size} | `{r.digest}` |" for r in make_plan(graph))
    return "\n".join([head, *rows])


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, and what to do about it where it is not fine."""

    level: Level
    what: str
    found: str
    do: str = ""

    @classmethod
    def of(cls, is_fine: bool, what: str, found: str, do: str, otherwise: Level = "fail") -> Self:
        return cls("ok", what, found) if is_fine else cls(otherwise, what, found, do)


@dataclass(frozen=True)
class Machine:
    cores: int
    memory_bytes: int
    free_bytes: int
    """Of the disk of all artifacts."""
    gpus: Machines | None = None
    """Those that training would use, all taken to be like the smallest."""

    @classmethod
    def this_machine(cls, root: Path) -> Machine:
        """This machine, with the disk that `root` is on or would be made on."""
        there = next(path for path in (root, *root.parents) if path.exists())
        cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory().total
        count, gpus = count_gpus(os.environ.get("CUDA_VISIBLE_DEVICES")), None
        if count and (asked := ask_driver("name,memory.total")):
            name, size = min(asked, key=lambda gpu: float(gpu[1]))
            gpus = Machines(count, name, round(float(size) / 1024))
        return cls(cores, memory, shutil.disk_usage(there).free, gpus)


def ask_driver(fields: str) -> list[list[str]]:
    """Fields of every GPU by nvidia-smi; empty without a driver that answers."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = ended.stdout.splitlines() if ended.returncode == 0 else []
    return [[word.strip() for word in line.split(",")] for line in lines if line.strip()]


def recipe_findings(
    recipe: Recipe, graph: Graph, profile: Profile, machine: Machine, given: Machines | None = None
) -> Iterator[Finding]:
    """Return what a recipe needs beside what there is, on the GPUs `given` or this machine's."""
    for step in graph.steps:
        if step.absent:
            missing = f"{len(step.absent)} not here"
            yield Finding("fail", f"inputs of {step.title}", missing, step.absent[0])
    try:
        graph.require_samples()
    except InputError as error:
        yield Finding("fail", "samples", str(error))
    yield _check_disk(graph, profile.root, machine)
    yield from check_tracking_place(profile)
    if not all(step.is_finished for step in graph.train):
        if given is None:
            yield _check_memory(recipe, profile, machine)
        yield from _check_training(recipe, profile, machine, given)


def check_tracking_place(profile: Profile) -> Iterator[Finding]:
    """Warn where machines share the root, and what is tracked lies in SQLite, which is for one."""
    is_shared = profile.root_url or not profile.launch.is_local
    if is_shared and profile.mlflow_uri.startswith(SQLITE):
        do = "name an MLflow server over PostgreSQL by EVACLIP_TRACKING_URI (docs/team.md)"
        yield Finding("warn", "tracking", f"{profile.mlflow_uri} is for one machine", do)


def summarise_findings(findings: Iterable[Finding]) -> str:
    """Yes or no: whether a recipe fits, and what is in the way."""
    findings = list(findings)
    failed = [one for one in findings if one.level == "fail"]
    shown = "; ".join(f"{one.what}: {one.found}" for one in failed or findings)
    return f"{'no' if failed else 'yes'}: {shown}"


def _check_disk(graph: Graph, root: Path, machine: Machine) -> Finding:
    needed = disk_bytes(graph)
    found = f"needs {format_bytes(needed)}, {format_bytes(machine.free_bytes)} are free"
    do = f"free some of {root}, or set EVACLIP_ROOT"
    return Finding.of(needed <= machine.free_bytes, "disk", found, do)


def _check_memory(recipe: Recipe, profile: Profile, machine: Machine) -> Finding:
    """Of the host: what all ranks here read ahead, and on a CPU what they train with."""
    if profile.launcher in ELSEWHERE:
        return Finding("ok", "memory", "of other machines")
    needed = 0.0
    for train in planned_stages(recipe):
        ranks = profile.ranks or default_ranks(
            machine.cores, machine.gpus.count if machine.gpus else 0
        )
        stage = float(ranks * reader_bytes(recipe, train, ranks))
        if machine.gpus is None:
            model = recipe.initialise.load_architecture().at_image_px(train.image_px)
            like = Machines(ranks, "CPU", max(1, machine.memory_bytes // ranks // 10**9))
            stage += ranks * cut_share(model, train, like).needed
        needed = max(needed, stage)
    found = f"needs {format_bytes(needed)} of {format_bytes(machine.memory_bytes)}"
    do = "train with fewer ranks (EVACLIP_RANKS), or a smaller shuffle_buffer"
    return Finding.of(needed <= machine.memory_bytes, "memory", found, do)


def _check_training(
    recipe: Recipe, profile: Profile, machine: Machine, given: Machines | None
) -> Iterator[Finding]:
    is_elsewhere = profile.launcher in ELSEWHERE
    machines = given or (None if is_elsewhere else machine.gpus)
    if machines is None and is_elsewhere:
        known = f"{profile.nodes} x {profile.ranks} ranks by {profile.launcher}"
        do = "their memory is not known here: plan with --gpus"
        yield Finding("warn", "GPUs", f"{known}, not looked at", do)
        return
    for train in planned_stages(recipe):
        model = recipe.initialise.load_architecture().at_image_px(train.image_px)
        what = f"GPUs for {train.name}"
        if machines is None:
            each = stage_flops_per_sample(model, train, text_tokens=shown_tokens(train))
            days = each * train.samples_seen / machine.cores / CPU_FLOPS_PER_CORE / 86_400
            time = f"{days:,.1f} days" if days >= 1 else f"{days * 24 * 60:,.0f} minutes"
            time = f"{days / 365:,.0f} years" if days >= 365 else time
            found = f"none, {time} on {machine.cores} cores"
            do = "train on GPUs, here or on a cluster (EVACLIP_LAUNCHER)"
            yield Finding.of(days <= CPU_DAYS, what, found, do)
        elif train.global_batch < machines.count:
            found = f"{machines} cannot share batches of {train.global_batch:,}"
            yield Finding("fail", what, found, "train on fewer")
        else:
            cut = cut_share(model, train, machines)
            found = f"needs {cut.needed / GIB:,.1f} of {cut.limit / GIB:,.1f} GiB on {machines}"
            yield Finding.of(cut.fits, what, found, "plan with --gpus says what would help")


def rehearse_training(recipe: Recipe, profile: Profile, graph: Graph) -> Iterator[str]:
    """Try every training stage whose data and starting weights are there; one line for each."""
    from tasks.train.train import Inputs, try_out

    for config, step in zip(recipe.train, graph.train, strict=True):
        start = step.inputs[Role.START]
        assert isinstance(start, Step), "a recipe starts from weights that it makes"
        given = [one for one in step.inputs.values() if isinstance(one, Step)]
        missing = [one.stage.name for one in given if not one.is_finished]
        if missing:
            yield f"{config.name}: not tried, {missing[0]} has not run yet"
            continue
        for one in given:
            fetch_artifact(one.folder)
        teachers = tuple(one.folder / FEATURES for one in given if one.stage.name == TEACH.name)
        inputs = Inputs(start.folder / MODEL_FOLDER, graph.dataset.folder / SHARDS, teachers)
        # Under the root, which all machines of a launch see.
        with TemporaryDirectory(dir=profile.root.resolve(), prefix=".dry-run-") as folder:
            found = try_out(config, inputs, Path(folder), profile.launch, report_nothing)
        seconds = found["data_wait_s"] + found["prepare_s"] + found["gradient_s"]
        yield (
            f"{config.name}: a step works on {found['ranks']} ranks ({found['device']}) with "
            f"{found['micro_batch']:,} pairs at once: {found['memory_peak_bytes'] / 1e9:.1f} GB a "
            f"rank, {seconds:.1f} s for the first, loss {found['loss']:.3f}"
        )
