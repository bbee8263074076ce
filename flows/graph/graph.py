"""The chart of a recipe: the address of every artifact it would make, before anything runs.

Covers: the one graph of stages (what is made from what), resolving `demo:` paths, and what is not
here yet: a chart can be drawn without it, so that it can be planned, but not be run.
Not here: running a stage (prepare.py, train.py, evaluate.py), printing a plan (plan.py).
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaclip_model.config import Config
from evaclip_model.errors import InputError
from flows.config.profile import Profile, load_profile
from flows.config.recipe import Recipe, load_recipe
from tasks.artifacts.artifact import DIGEST_CHARS, Address, Stage, fingerprint
from tasks.dataset.config import RULES_IN_FILES
from tasks.dataset.config import STAGE as DATASET
from tasks.dataset.lists import read_takedowns, takedowns_digest
from tasks.demo.config import STAGE as DEMO
from tasks.download.config import STAGE as DOWNLOAD
from tasks.evaluate.config import STAGE as EVALUATE
from tasks.initialise.config import STAGE as INITIALISE
from tasks.merge.config import STAGE as MERGE
from tasks.merge.metadata_files import find_metadata, is_url, outside_files, remote_fingerprint
from tasks.register.config import STAGE as REGISTER
from tasks.train.config import STAGE as TRAIN
from tasks.verify.config import STAGE as VERIFY

DEMO_PREFIX = "demo:"
ABSENT = "absent"
"""Stands among an address's parents for outside data that is not here. Such an address, and all
that follow from it, are not the ones that a run would have."""


@dataclass(frozen=True)
class Absent:
    """Outside data that a recipe reads and that is not on this machine."""

    stage: str
    """Name of the stage that reads it."""
    sentence: str
    """What it is, and where to get it."""


@dataclass(frozen=True)
class Chart:
    """Every artifact of one recipe, addressed."""

    demo: Address | None
    merge: Address
    download: Address
    verify: Address
    dataset: Address
    initialise: Address
    train: tuple[Address, ...]
    """One a training stage, in order."""
    evaluate: Address
    register: Address
    absent: tuple[Absent, ...] = ()

    def steps(self) -> Iterator[Address]:
        """All addresses in the order they are made."""
        if self.demo:
            yield self.demo
        yield from (self.merge, self.download, self.verify, self.dataset)
        yield from (self.initialise, *self.train, self.evaluate, self.register)

    def unsettled(self) -> frozenset[str]:
        """Digests of addresses that will be others once what is absent is there."""
        found: set[str] = set()
        for address in self.steps():
            if found.union([ABSENT]) & set(address.parents.values()):
                found.add(address.digest)
        return frozenset(found)

    def require(self, flow: str) -> None:
        """Raises: InputError: the flow of this name reads what is not on this machine."""
        stages = [address.stage.name for address in self.steps()]
        last = {"prepare": DATASET.name, "train": TRAIN.name}.get(flow, EVALUATE.name)
        read = stages[: stages.index(last) + 1]
        absent = [one.sentence for one in self.absent if one.stage in read]
        if absent:
            more = f" ({len(absent) - 1} more: see the plan)" if len(absent) > 1 else ""
            raise InputError(f"{absent[0]}{more}")

    @property
    def is_finished(self) -> bool:
        return all(address.is_finished for address in self.steps())


def load_chart(recipe: str, overrides: Sequence[str]) -> tuple[Recipe, Profile, Chart]:
    """Load a recipe and the profile, and draw their chart.

    Raises:
        InputError: the recipe, an override or the profile is wrong.
    """
    resolved, profile = load_recipe(recipe, overrides), load_profile()
    return resolved, profile, draw_chart(resolved, profile.root.resolve(), profile.mlflow_uri)


def draw_chart(recipe: Recipe, root: Path, tracking_uri: str) -> Chart:
    """Address every artifact of `recipe` under `root`; what is not here is in the chart's `absent`.

    Raises:
        InputError: the recipe names files of the demo and has no demo.
    """

    def at(stage: Stage, config: Config, parents: Mapping[str, str]) -> Address:
        return Address.of(root, stage, config, parents)

    demo = at(DEMO, recipe.demo, {}) if recipe.demo else None
    outside = _Outside(demo)
    merge = at(MERGE, recipe.merge, _metadata(recipe, outside))
    download = at(DOWNLOAD, recipe.download, {"merge": merge.digest})
    verify = at(VERIFY, recipe.verify, {"download": download.digest})
    rules = _dataset_files(recipe, outside)
    dataset = at(DATASET, recipe.dataset, {"verify": verify.digest, **rules})
    initialise = at(INITIALISE, recipe.initialise, _weights(recipe, outside))
    train: list[Address] = []
    for stage in recipe.train:
        start = train[-1] if train else initialise
        train.append(at(TRAIN, stage, {"start_from": start.digest, "dataset": dataset.digest}))
    sets = {
        one.name: outside.mark(EVALUATE, one.folder, f"evaluate.sets '{one.name}'")
        for one in recipe.evaluate.sets
    }
    models = {"train": train[-1].digest, "initialise": initialise.digest}
    evaluate = at(EVALUATE, recipe.evaluate, {**models, **sets})
    tracking = hashlib.sha256(tracking_uri.encode()).hexdigest()[:DIGEST_CHARS]
    made = {"train": train[-1].digest, "evaluate": evaluate.digest, "tracking": tracking}
    register = at(REGISTER, recipe.registry, made)
    return Chart(
        *(demo, merge, download, verify, dataset, initialise, tuple(train), evaluate, register),
        tuple(outside.absent),
    )


class NotHere(InputError):
    """Outside data that a recipe names is not to be found from this machine."""


class _Outside:
    """Marks of outside data, and what of it is absent."""

    def __init__(self, demo: Address | None) -> None:
        self.demo = demo
        self.absent: list[Absent] = []

    def mark(self, stage: Stage, pattern: str, where: str, edition: str = "") -> str:
        """What stands for the files of `pattern` among the parents of the stage's artifact."""
        try:
            return _origin(pattern, self.demo, where)
        except NotHere as error:
            return self.lacks(stage, f"{error}; it is {edition}" if edition else str(error))

    def lacks(self, stage: Stage, sentence: str) -> str:
        """Note that something is absent; what stands for it."""
        self.absent.append(Absent(stage.name, sentence))
        return ABSENT


def _metadata(recipe: Recipe, outside: _Outside) -> dict[str, str]:
    editions = {source.name: source.revision for source in recipe.merge.sources}
    return {
        one.role: outside.mark(MERGE, one.files, f"merge.{one.where}", editions.get(one.role, ""))
        for one in outside_files(recipe.merge)
    }


def _weights(recipe: Recipe, outside: _Outside) -> dict[str, str]:
    absent = recipe.initialise.absent()
    return {
        role: outside.lacks(INITIALISE, absent[role]) if role in absent else fingerprint(path)
        for role, path in recipe.initialise.named().items()
    }


def _dataset_files(recipe: Recipe, outside: _Outside) -> dict[str, str]:
    """What stands for the files that the dataset's rules name."""
    rules = recipe.dataset
    found: dict[str, str] = {}
    for name in RULES_IN_FILES:
        where = f"dataset.{name}"
        marks = [outside.mark(DATASET, pattern, where) for pattern in getattr(rules, name)]
        if marks:
            known = hashlib.sha256("".join(marks).encode()).hexdigest()[:DIGEST_CHARS]
            found[name] = ABSENT if ABSENT in marks else known
    try:
        entries = read_takedowns(find_all(rules.takedowns, outside.demo, "dataset.takedowns"))
    except NotHere as error:
        return {**found, "takedowns": outside.lacks(DATASET, str(error))}
    return {**found, "takedowns": takedowns_digest(entries)} if entries else found


def find_files(pattern: str, demo: Address | None, where: str) -> list[Path] | list[str]:
    """The files (or the folder) a recipe's pattern names; `demo:` is the demo artifact's folder.

    A URL with wildcards names URLs.

    Raises:
        NotHere: nothing matches.
        InputError: `demo:` is used in a recipe without a [demo] table.
    """
    if is_url(pattern):
        try:
            return find_metadata(pattern, where)
        except InputError as error:
            raise NotHere(str(error)) from error
    if pattern.startswith(DEMO_PREFIX):
        if demo is None:
            raise InputError(f"{where}: '{pattern}' needs a [demo] table in the recipe")
        pattern = str(Path(glob.escape(str(demo.folder))) / pattern.removeprefix(DEMO_PREFIX))
    found = sorted(Path(match) for match in glob.glob(pattern))
    if not found:
        raise NotHere(f"{where}: no file matches '{pattern}'")
    return found


def find_all(patterns: Sequence[str], demo: Address | None, where: str) -> list[Path]:
    """The files (or folders) of several patterns, in their order.

    Raises:
        NotHere: a pattern matches nothing.
        InputError: a pattern is a URL.
    """
    found = []
    for path in (path for pattern in patterns for path in find_files(pattern, demo, where)):
        if isinstance(path, str):
            raise InputError(f"{where}: '{path}' is a URL; give a copy of it on this machine")
        found.append(path)
    return found


def _origin(pattern: str, demo: Address | None, where: str) -> str:
    """What stands for outside data in a digest: the demo's, or a fingerprint of the files."""
    if pattern.startswith(DEMO_PREFIX) and demo is not None:
        return demo.digest
    files = find_files(pattern, demo, where)
    if is_url(pattern):
        return remote_fingerprint([str(url) for url in files])
    marks = "".join(fingerprint(Path(file)) for file in files)
    return hashlib.sha256(marks.encode()).hexdigest()[:DIGEST_CHARS]
