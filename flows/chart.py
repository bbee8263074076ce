"""The chart of a recipe: the address of every artifact it would make, before anything runs.

Covers: the one graph of stages (what is made from what), and resolving `demo:` paths.
Not here: running a stage (prepare.py, train.py, evaluate.py), printing a plan (plan.py).
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaclip_model.config import Config
from evaclip_model.errors import InputError
from flows.profile import Profile, load_profile
from flows.recipe import Recipe, load_recipe
from tasks.artifact import DIGEST_CHARS, Address, Stage, fingerprint
from tasks.dataset.config import RULES_IN_FILES
from tasks.dataset.config import STAGE as DATASET
from tasks.dataset.lists import read_takedowns, takedowns_digest
from tasks.demo.config import STAGE as DEMO
from tasks.download.config import STAGE as DOWNLOAD
from tasks.evaluate.config import STAGE as EVALUATE
from tasks.initialise.config import STAGE as INITIALISE
from tasks.merge.config import STAGE as MERGE
from tasks.merge.sources import find_metadata, is_url, outside_files, remote_fingerprint
from tasks.register.config import STAGE as REGISTER
from tasks.train.config import STAGE as TRAIN
from tasks.verify.config import STAGE as VERIFY

DEMO_PREFIX = "demo:"


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

    def steps(self) -> Iterator[Address]:
        """All addresses in the order they are made."""
        if self.demo:
            yield self.demo
        yield from (self.merge, self.download, self.verify, self.dataset)
        yield from (self.initialise, *self.train, self.evaluate, self.register)

    @property
    def is_finished(self) -> bool:
        return all(address.is_finished for address in self.steps())


def load_chart(recipe: str, overrides: Sequence[str]) -> tuple[Recipe, Profile, Chart]:
    """Load a recipe and the profile, and draw their chart.

    Raises:
        InputError: the recipe, an override, the profile or a source's files are wrong.
    """
    resolved, profile = load_recipe(recipe, overrides), load_profile()
    return resolved, profile, draw_chart(resolved, profile.root.resolve(), profile.mlflow_uri)


def draw_chart(recipe: Recipe, root: Path, tracking_uri: str) -> Chart:
    """Address every artifact of `recipe` under `root`.

    Raises:
        InputError: metadata or evaluation files outside the pipeline do not exist.
    """

    def at(stage: Stage, config: Config, **parents: str) -> Address:
        return Address.of(root, stage, config, parents)

    demo = at(DEMO, recipe.demo) if recipe.demo else None
    metadata = {
        outside.role: _origin(outside.files, demo, f"merge.{outside.where}")
        for outside in outside_files(recipe.merge)
    }
    merge = at(MERGE, recipe.merge, **metadata)
    download = at(DOWNLOAD, recipe.download, merge=merge.digest)
    verify = at(VERIFY, recipe.verify, download=download.digest)
    dataset = at(DATASET, recipe.dataset, verify=verify.digest, **_dataset_files(recipe, demo))
    weights = {role: fingerprint(path) for role, path in recipe.initialise.files().items()}
    initialise = at(INITIALISE, recipe.initialise, **weights)
    train: list[Address] = []
    for stage in recipe.train:
        start = train[-1] if train else initialise
        train.append(at(TRAIN, stage, start_from=start.digest, dataset=dataset.digest))
    sets = {
        wanted.name: _origin(wanted.folder, demo, f"evaluate.sets '{wanted.name}'")
        for wanted in recipe.evaluate.sets
    }
    evaluate = at(
        EVALUATE, recipe.evaluate, train=train[-1].digest, initialise=initialise.digest, **sets
    )
    register = at(
        REGISTER,
        recipe.registry,
        train=train[-1].digest,
        evaluate=evaluate.digest,
        tracking=hashlib.sha256(tracking_uri.encode()).hexdigest()[:DIGEST_CHARS],
    )
    return Chart(
        *(demo, merge, download, verify, dataset, initialise, tuple(train), evaluate, register)
    )


def find_files(pattern: str, demo: Address | None, where: str) -> list[Path] | list[str]:
    """The files (or the folder) a recipe's pattern names; `demo:` is the demo artifact's folder.

    A URL with wildcards names URLs.

    Raises:
        InputError: nothing matches, or `demo:` is used in a recipe without a [demo] table.
    """
    if is_url(pattern):
        return find_metadata(pattern, where)
    if pattern.startswith(DEMO_PREFIX):
        if demo is None:
            raise InputError(f"{where}: '{pattern}' needs a [demo] table in the recipe")
        pattern = str(Path(glob.escape(str(demo.folder))) / pattern.removeprefix(DEMO_PREFIX))
    found = sorted(Path(match) for match in glob.glob(pattern))
    if not found:
        raise InputError(f"{where}: no file matches '{pattern}'")
    return found


def _dataset_files(recipe: Recipe, demo: Address | None) -> dict[str, str]:
    """What stands for the files that the dataset's rules name."""
    rules = recipe.dataset
    marks = {
        name: [_origin(pattern, demo, f"dataset.{name}") for pattern in getattr(rules, name)]
        for name in RULES_IN_FILES
    }
    found = {
        name: hashlib.sha256("".join(origins).encode()).hexdigest()[:DIGEST_CHARS]
        for name, origins in marks.items()
        if origins
    }
    entries = read_takedowns(find_all(rules.takedowns, demo, "dataset.takedowns"))
    return {**found, "takedowns": takedowns_digest(entries)} if entries else found


def find_all(patterns: Sequence[str], demo: Address | None, where: str) -> list[Path]:
    """The files (or folders) of several patterns, in their order.

    Raises:
        InputError: a pattern matches nothing, or is a URL.
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
