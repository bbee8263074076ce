"""A recipe: everything that decides a result, one TOML file.

Covers: the stages' configs side by side, finding and loading recipes, `--set` overrides, the
recipe's digest.
Not here: where things run (profile.py), what would be made (chart.py), any stage's own settings.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from evaclip_model.config import Config
from evaclip_model.errors import InputError
from evaclip_model.training.config import TrainConfig
from tasks.dataset.config import DatasetConfig
from tasks.demo.config import DemoConfig
from tasks.download.config import DownloadConfig
from tasks.evaluate.config import EvaluateConfig
from tasks.initialise.config import InitialiseConfig
from tasks.merge.config import MergeConfig
from tasks.register.config import RegisterConfig
from tasks.verify.config import VerifyConfig

RECIPES = Path(__file__).parent / "recipes"


class Recipe(Config):
    """The stages' configs side by side; the tables of the TOML file have the same names."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    """What it is called in run names and tags."""
    title: str
    """One line for a person: what it makes, on what."""
    demo: DemoConfig | None = None
    """The loopback web and its metadata; only recipes that bring their own data have it."""
    merge: MergeConfig
    download: DownloadConfig
    verify: VerifyConfig
    dataset: DatasetConfig = DatasetConfig()
    initialise: InitialiseConfig
    train: tuple[TrainConfig, ...] = Field(min_length=1)
    """Training stages in order; each starts from the one before, the first from `initialise`."""
    evaluate: EvaluateConfig
    registry: RegisterConfig = Field(alias="register")
    """Table `[register]`; the attribute has another name because every class has `register`."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Recipe:
        names = [stage.name for stage in self.train]
        if len(set(names)) < len(names):
            raise ValueError(f"training stages must have different names, got {names}")
        if self.merge.rows_per_file % self.download.samples_per_shard:
            raise ValueError(
                f"merge.rows_per_file ({self.merge.rows_per_file}) must be a multiple of "
                f"download.samples_per_shard ({self.download.samples_per_shard}), or every file "
                "ends in a short shard"
            )
        sources = {source.name for source in self.merge.sources}
        for stage in self.train:
            unknown = sorted(set(stage.source_weights) - sources)
            if unknown:
                raise ValueError(
                    f"training stage '{stage.name}' weights source '{unknown[0]}', which is none "
                    f"of merge.sources ({', '.join(sorted(sources))})"
                )
        return self

    @property
    def digest(self) -> str:
        """16 hex characters over every setting; equal recipes have equal digests."""
        text = json.dumps(self.model_dump(mode="json", by_alias=True), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The resolved recipe, all defaults filled in."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=1) + "\n"


def recipe_names() -> list[str]:
    """Names of the recipes that come with the project."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe by name (`demo`) or path (`my/own.toml`), with `table.key=value` overrides.

    Raises:
        InputError: no such recipe, not TOML, a wrong key, an override that fits nothing.
    """
    path = _find(name_or_path)
    try:
        values = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path.name} is not valid TOML: {error}") from None
    for override in overrides:
        values = _with_override(values, override)
    return Recipe.from_mapping(values, where=path.name)


def _find(name_or_path: str) -> Path:
    if name_or_path.endswith(".toml"):
        path = Path(name_or_path)
        if not path.is_file():
            raise InputError(f"there is no recipe file {name_or_path}")
        return path
    names = recipe_names()
    if name_or_path not in names:
        near = difflib.get_close_matches(name_or_path, names, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(names)}"
        raise InputError(f"unknown recipe '{name_or_path}'; {hint}")
    return RECIPES / f"{name_or_path}.toml"


def _with_override(values: dict[str, Any], override: str) -> dict[str, Any]:
    """A copy of `values` with one `table.key=value` set; list items by index or by their name."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override}: expected table.key=value")
    changed = copy.deepcopy(values)
    at: Any = changed
    *tables, last = key.split(".")
    for table in tables:
        at = _step(at, table, override)
    if not isinstance(at, dict):
        raise InputError(f"--set {override}: '{'.'.join(tables)}' is a list, name one of its items")
    at[last] = _parse(text)
    return changed


def _step(at: Any, table: str, override: str) -> Any:
    if isinstance(at, dict):
        if not isinstance(at.setdefault(table, {}), dict | list):
            raise InputError(f"--set {override}: '{table}' is a value, not a table")
        return at[table]
    for index, item in enumerate(at):
        if isinstance(item, dict) and table in (str(index), item.get("name")):
            return item
    named = ", ".join(str(i.get("name", n)) for n, i in enumerate(at) if isinstance(i, dict))
    raise InputError(f"--set {override}: no item '{table}' in this list, there are: {named}")


def _parse(text: str) -> Any:
    """A TOML value where it is one (number, boolean, list, quoted string), else the bare text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
