"""The base of every configuration object: frozen, strict, and clear about what is wrong.

Covers: the pydantic base class and the one-sentence rendering of its validation errors.
Not here: any setting; each lives beside the code that uses it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import UnionType
from typing import Any, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from evaclip_model.errors import InputError


class Config(BaseModel):
    """Settings of one part: immutable, without unknown keys, comparable and serialisable."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str) -> Self:
        """Validate `values`, read from `where` (a file name, for the message).

        Raises:
            InputError: naming the first wrong key, what was expected, and the nearest known key.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise InputError(f"{where}: {explain(cls, error)}") from None


def explain(model: type[BaseModel], error: ValidationError) -> str:
    """Render the first problem of a pydantic validation error as one sentence."""
    first = error.errors(include_url=False)[0]
    location = tuple(part for part in first["loc"])
    key = ".".join(str(part) for part in location)
    more = f" ({error.error_count() - 1} more problems follow)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = sorted(_fields_at(model, location[:-1]))
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key '{key}'; {hint}{more}"
    if first["type"] == "missing":
        return f"key '{key}' is missing{more}"
    got = repr(first["input"])
    reason = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if not key:
        return f"{reason}{more}"
    return f"'{key}' {reason}, got {got[:80]}{more}"


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> set[str]:
    """Known keys of the (nested) model that `location` leads to; empty when it leads elsewhere."""
    current: Any = model
    for part in location:
        if isinstance(part, int):
            continue
        field = current.model_fields.get(part) if hasattr(current, "model_fields") else None
        if field is None:
            return set()
        current = _model_inside(field.annotation)
    return set(current.model_fields) if hasattr(current, "model_fields") else set()


def _model_inside(annotation: Any) -> Any:
    """The pydantic model inside `X | None`, `list[X]`, `tuple[X, ...]` or `dict[str, X]`."""
    if get_origin(annotation) in (Union, UnionType, list, tuple, dict):
        for argument in get_args(annotation):
            found = _model_inside(argument)
            if hasattr(found, "model_fields"):
                return found
    return annotation
