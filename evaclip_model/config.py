"""The base of every configuration object: frozen, strict, and clear about what is wrong; and the
form that digests are taken of, which outlives renamed and added settings."""

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from evaclip_model.errors import InputError


class Config(BaseModel):
    """Settings of one part: immutable, without unknown keys, comparable and serialisable."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    RENAMED: ClassVar[Mapping[str, str]] = {}
    """First key of a setting, refused -> its present key, dotted where it moved into a table."""
    REMOVED: ClassVar[Mapping[str, str]] = {}
    """Key of a setting that is gone -> the reason, with which it is refused."""
    ADDED: ClassVar[tuple[str, ...]] = ()
    """Settings that came after there were artifacts."""

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str) -> Self:
        """Validate `values`, read from `where` (a file name, for the message); raises InputError,
        naming the first wrong key, what was expected, and the nearest known key."""
        if not isinstance(values, Mapping):
            raise InputError(
                f"{where} should hold a JSON object, keys and values in braces, not "
                f"{repr(values)[:40]}"
            )
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise InputError(f"{where}: {explain_error(cls, error)}") from None

    def compute_identity(self) -> dict[str, Any]:
        """The settings in JSON's types, in the form that digests and checkpoints are tied to: a
        setting of `RENAMED` has its first key here, and one of `ADDED` is left out while it has its
        default, so that whatever was made before the change is still found."""
        dumped = self.model_dump(mode="json", by_alias=True)
        identity: dict[str, Any] = _replace_tables(self, dumped)
        return identity


def _replace_tables(value: Any, dumped: Any) -> Any:
    """`dumped`, pydantic's JSON form of `value`, with every table as in `compute_identity`."""
    if isinstance(value, Config):
        found = {}
        for name, field in type(value).model_fields.items():
            held = getattr(value, name)
            is_default = held == field.get_default(call_default_factory=True)
            if name not in value.ADDED or not is_default:
                key = field.alias or name
                found[key] = _replace_tables(held, dumped[key])
        for first, present in value.RENAMED.items():
            *tables, last = present.split(".")
            table = found
            for name in tables:
                table = table[name]
            found[first] = table.pop(last)
        moved_to = {present.partition(".")[0] for present in value.RENAMED.values()}
        return {key: held for key, held in found.items() if held != {} or key not in moved_to}
    if isinstance(value, list | tuple):
        return [_replace_tables(*pair) for pair in zip(value, dumped, strict=True)]
    if isinstance(value, dict):
        pairs = zip(value.values(), dumped.items(), strict=True)
        return {key: _replace_tables(held, dump) for held, (key, dump) in pairs}
    return dumped


def refuse_repeated_names(what: str, names: Iterable[str]) -> None:
    """Raises ValueError: two of `what` (a plural) have the same name."""
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise ValueError(f"two {what} are named '{twice[0]}'")


def explain_error(model: type[BaseModel], error: ValidationError) -> str:
    """Render the first problem of a pydantic validation error as one sentence."""
    first = error.errors(include_url=False)[0]
    *tables, last = map(str, first["loc"] or ("",))
    key = ".".join([*tables, last])
    more = f" ({error.error_count() - 1} more problems follow)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        table = _model_at(model, first["loc"][:-1])
        if renamed := getattr(table, "RENAMED", {}).get(last):
            present = ".".join([*tables, renamed])
            return f"'{key}' is called '{present}' now: write it under that name{more}"
        if removed := getattr(table, "REMOVED", {}).get(last):
            return f"'{key}' is no longer a setting: {removed}; leave it out{more}"
        fields = getattr(table, "__pydantic_fields__", {})
        known = sorted(field.alias or name for name, field in fields.items())
        near = difflib.get_close_matches(last, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key '{key}'; {hint}{more}"
    if first["type"] == "missing":
        return f"key '{key}' is missing{more}"
    got = repr(first["input"])
    reason = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if not key:
        return f"{reason}{more}"
    return f"'{key}' {reason}, got {got[:80]}{more}"


def _model_at(model: type[BaseModel], location: tuple[int | str, ...]) -> Any:
    current: Any = model
    for part in location:
        if isinstance(part, int):
            continue
        fields = getattr(current, "__pydantic_fields__", {})
        field = next((f for name, f in fields.items() if part in (name, f.alias)), None)
        if field is None:
            return None
        current = _model_inside(field.annotation)
    return current


def _model_inside(annotation: Any) -> Any:
    """The pydantic model inside `X | None`, `list[X]`, `tuple[X, ...]` or `dict[str, X]`."""
    inside = map(_model_inside, get_args(annotation))
    found = (one for one in inside if hasattr(one, "__pydantic_fields__"))
    return next(found, annotation)
