"""Arguments of `score`: models, sets, and where they go in the graph. Not here: opening models
(tasks/encoders/open_models.py), the flow (flows/pipeline.py)."""

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaclip_model.errors import InputError
from flows.config.recipe import load_recipe
from flows.config.recipe_loader import apply_override, find_recipe, read_recipe
from flows.graph.graph import demo_step, evaluate_step, find_sets
from flows.graph.outside_data import fingerprint_model
from flows.graph.step import Input, Step
from tasks.artifacts.artifact import Role, fingerprint_files
from tasks.encoders.open_models import OPEN_CLIP, TRANSFORMERS
from tasks.evaluate.config import STAGE, EvaluateConfig
from tasks.evaluate.sets import set_registry
from tasks.evaluate.sets.published_layout import kind_of
from tasks.initialise.config import REGISTRY

EVALUATE = STAGE.name
Names = Sequence[str]


@dataclass(frozen=True)
class Asked:
    """Models by name, the first one the subject, and the sets they are evaluated on."""

    models: dict[str, str]
    config: EvaluateConfig
    sets: dict[str, Path]

    def make_step(self, root: Path, specs: dict[str, str]) -> Step:
        inputs: dict[str, Input] = {f"model.{one}": fingerprint_model(specs[one]) for one in specs}
        inputs |= {f"set.{name}": fingerprint_files(folder) for name, folder in self.sets.items()}
        # Which model is the subject decides what is compared with what.
        inputs[Role.SUBJECT] = next(iter(specs))
        return evaluate_step(root, self.config, inputs, specs, lambda: self.sets, title="score")


def read_asked(
    models: Names, recipe: str, sets: Names, data: str, overrides: Names, root: Path
) -> Asked:
    """Return what the arguments of `score` mean."""
    if bool(recipe) == bool(sets):
        raise InputError("say what to evaluate on: give a recipe, or the names of sets")
    demo = None
    if sets:
        config = _named_sets(sets, Path(data), overrides)
    elif set(values := read_recipe(path := find_recipe(recipe))) == {EVALUATE}:
        config = _read_evaluation(values, overrides, path.name)
    else:
        whole = load_recipe(recipe, overrides)
        config, demo = whole.evaluate, demo_step(root, whole.demo) if whole.demo else None
    return Asked(_named_models(models), config, find_sets(config, demo))


def _read_evaluation(values: dict[str, Any], overrides: Names, where: str) -> EvaluateConfig:
    for override in overrides:
        if not override.startswith(f"{EVALUATE}."):
            raise InputError(
                f"--set {override}: without a whole recipe there is only {EVALUATE}, as in "
                f"{EVALUATE}.precision=bf16 or {EVALUATE}.sets.NAME.templates=openai"
            )
        values = apply_override(values, override)
    return EvaluateConfig.from_mapping(values[EVALUATE], where=where)


def _named_sets(names: Names, data: Path, overrides: Names) -> EvaluateConfig:
    entries = []
    for given in _list_given(names, data):
        name, folder = _named_set(given, data)
        own = {} if set_registry.find_set(name) else {"kind": kind_of(folder)}
        entries.append({"name": name, "folder": glob.escape(str(folder)), **own})
    return _read_evaluation({EVALUATE: {"sets": entries}}, overrides, "the sets named")


def _list_given(names: Names, data: Path) -> list[str]:
    """The names, a group's as those of its sets in `data`; the report says which are not there."""
    found: list[str] = []
    for name in names:
        group = [set_registry.find_set(key) for key in set_registry.sets_of_group(name)]
        there = [one.key for one in group if one and set_registry.find_set_folder(one, data)]
        if group and not there:
            raise InputError(f"{data} holds none of the {len(group)} sets of '{name}'")
        found += there if group else [name]
    return found


def _named_set(given: str, data: Path) -> tuple[str, Path]:
    """Name and folder of a set: a known set's name, a folder in `data` (which by the name it is
    published under may be a known set), a path, or NAME=FOLDER."""
    name, equals, path = given.partition("=")
    known = set_registry.find_set(name)
    if equals:
        folder = Path(path)
    elif known:
        folder = set_registry.find_set_folder(known, data) or data / known.wds
    else:
        places = [Path(given)] if "/" in given else [data / given, Path(given)]
        folder = next(filter(Path.is_dir, places), places[0])
        known = set_registry.find_published_set(folder)
        name = known.key if known else re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name)
    if not folder.is_dir():
        else_give = ", the name of a known set, a path, or NAME=FOLDER"
        if known:
            else_give = f" ({known.obtain}), or {name}=FOLDER"
        raise InputError(
            f"evaluation set '{name}' is not in {data}: expected the folder {folder}{else_give}"
        )
    return name, folder


def _named_models(models: Names) -> dict[str, str]:
    specs: dict[str, str] = {}
    for model in models:
        name, equals, spec = model.partition("=")
        if not equals:
            name, spec = _short_name(model), model
        if name in specs:
            raise InputError(
                f"two models are called '{name}': put a name of your own before one, as "
                f"other={spec}"
            )
        if not spec.startswith(REGISTRY):
            fingerprint_model(spec)
        specs[name] = spec
    return specs


def _short_name(spec: str) -> str:
    """The telling end of a spec: a folder's name, an alias, an architecture."""
    if spec.startswith(TRANSFORMERS):
        return Path(spec.removeprefix(TRANSFORMERS)).name
    if spec.startswith((OPEN_CLIP, REGISTRY)):
        return spec.partition(":")[2].strip("/")
    path, _, architecture = spec.rpartition(":")
    if path and not Path(spec).exists():
        return Path(architecture).stem if architecture.endswith(".json") else architecture
    folder = Path(spec)
    return folder.parent.name if folder.name in ("model", "ema") else folder.name
