"""From the TOML files of a recipe to one mapping, its tables not yet checked (recipe.py does).

One rule puts files together: tables are merged key by key, and so are items of a list that have the
same `name`; of anything else the later one stays. Included files come first, then the file itself,
then overrides; `[train_defaults]` lies under every `[[train]]` item. Also the types of a flow's
form, whose rules the server checks before a run.
"""

import copy
import difflib
import tomllib
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from evaclip_model.errors import InputError

RECIPES = Path(__file__).parents[1] / "recipes"
INCLUDE = "include"
DEFAULTS = "train_defaults"
STAGES = "train"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


# Prefect stores each rule with the deployment: recipes that are added later are known to the form
# after the next `make up`. A browser's regular expressions refuse most that re.escape would write.
_NAMES = "|".join(name.replace(".", "[.]") for name in recipe_names())
RecipeName = Annotated[str, Field(pattern=rf"^({_NAMES}|.+[.]toml)$")]
"""One of the project's recipes, or the path of a .toml file as the worker sees it."""
# No address with an "@": the server keeps parameters in clear, a password too.
_NO_PASSWORD = "([^@]*|([^:]|:[^/]|:/[^/])*)"
_OVERRIDE = rf"^[A-Za-z_][\w-]*([.][\w-]+)*={_NO_PASSWORD}$"
Overrides = tuple[Annotated[str, Field(pattern=_OVERRIDE)], ...]
"""Changes to a recipe, each `table.key=value`; none with a password in an address."""


def find_recipe(name_or_path: str) -> Path:
    """The file of a recipe, named as the project's own or by its path."""
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


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe's tables with everything included, overridden and shared in its place."""
    values = _with_included(path, ())
    for override in overrides:
        values = apply_override(values, override)
    shared = values.pop(DEFAULTS, None)
    if shared is not None:
        stages = values.get(STAGES)
        if not isinstance(shared, dict) or not isinstance(stages, list):
            raise InputError(f"{path.name}: [{DEFAULTS}] is a table beside [[{STAGES}]] items")
        values[STAGES] = [merge_tables(shared, stage) for stage in stages]
    return values


def last_settings(
    path: Path, overrides: Sequence[str], stage: str, number: int, base: Set[str]
) -> set[str]:
    """The settings of a training stage that the last hand wrote which wrote one of `base`: those of
    `overrides`, if it was they, else those of the file itself too, never of what it includes."""
    named = (stage, str(number), DEFAULTS)
    keys = [override.partition("=")[0].split(".") for override in overrides]
    last = {key[-1] for key in keys if len(key) > 1 and key[-2] in named}
    if not last & base:
        values = tomllib.loads(path.read_text())
        items = [one for one in values.get(STAGES, []) if one.get("name") == stage]
        last.update(*items, values.get(DEFAULTS, {}))
    return last


def merge_tables(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `below` with `above` laid over it, table by table and named item by named item."""
    result = dict(copy.deepcopy(below))
    for key, value in above.items():
        result[key] = _laid_over(result[key], value) if key in result else copy.deepcopy(value)
    return result


def _laid_over(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return merge_tables(below, above)
    if _has_names(below) and _has_names(above):
        items = {item["name"]: item for item in below}
        for item in above:
            items[item["name"]] = merge_tables(items.get(item["name"], {}), item)
        return list(items.values())
    return copy.deepcopy(above)


def _has_names(value: Any) -> bool:
    if not isinstance(value, list) or not value:  # an empty list takes out what is below it
        return False
    return all(isinstance(item, dict) and "name" in item for item in value)


def _with_included(path: Path, around: tuple[Path, ...]) -> dict[str, Any]:
    """The file's tables over those of the files it includes; `around`: the files that led here."""
    try:
        values = tomllib.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path.name} is not valid TOML: {error}") from None
    included = values.pop(INCLUDE, [])
    if not isinstance(included, list) or not all(isinstance(name, str) for name in included):
        raise InputError(f'{path.name}: include is a list of paths, like ["data/merged2b.toml"]')
    result: dict[str, Any] = {}
    for name in included:
        below = path.parent / name
        if not below.is_file():
            raise InputError(f"{path.name} includes '{name}', but there is no {below}")
        if below.resolve() in (path.resolve(), *around):
            raise InputError(f"{path.name} includes '{name}', which includes it in turn")
        result = merge_tables(result, _with_included(below, (*around, path.resolve())))
    return merge_tables(result, values)


def apply_override(values: dict[str, Any], override: str) -> dict[str, Any]:
    """A copy of `values` with one `table.key=value` set, or taken out where no value follows; list
    items by index or by their name."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override}: expected table.key=value")
    changed = copy.deepcopy(values)
    at: Any = changed
    *tables, last = key.split(".")
    for table in tables:
        at = _step_into(at, table, override)
    if not isinstance(at, dict):
        raise InputError(f"--set {override}: '{'.'.join(tables)}' is a list, name one of its items")
    if text:
        at[last] = _parse_value(text)
    else:
        at.pop(last, None)
    return changed


def _step_into(at: Any, table: str, override: str) -> Any:
    if isinstance(at, dict):
        if not isinstance(at.setdefault(table, {}), dict | list):
            raise InputError(f"--set {override}: '{table}' is a value, not a table")
        return at[table]
    for index, item in enumerate(at):
        if isinstance(item, dict) and table in (str(index), item.get("name")):
            return item
    named = ", ".join(str(i.get("name", n)) for n, i in enumerate(at) if isinstance(i, dict))
    raise InputError(f"--set {override}: no item '{table}' in this list, there are: {named}")


def _parse_value(text: str) -> Any:
    """A TOML value where it is one (number, boolean, list, quoted string), else the bare text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
