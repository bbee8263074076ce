"""ImageNet's class names and prompts, read from open_clip_torch's source without running it."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

from evaclip_model.errors import InputError
from evaclip_model.tokenizer.bundled_assets import package_file

PLACEHOLDER = "{c}"
"""Stands in a template for the class name."""

_FILE = "zero_shot_metadata.py"
_CLASSNAMES = "IMAGENET_CLASSNAMES"
_TEMPLATES = "OPENAI_IMAGENET_TEMPLATES"


@functools.cache
def imagenet_classnames() -> tuple[str, ...]:
    """The 1000 class names in the order of ImageNet's class ids (sorted folder names).

    Raises:
        InputError: open_clip_torch is not installed, or keeps them in another form.
    """
    return tuple(_read_string(node) for node in _read_entries(_CLASSNAMES, 1000))


@functools.cache
def imagenet_templates() -> tuple[str, ...]:
    """The 80 prompts, each with one `{c}` for the class name (Radford et al. 2021).

    Raises:
        InputError: open_clip_torch is not installed, or keeps them in another form.
    """
    # Each is written as a function from the class name to an f-string.
    return tuple(
        _read_string(node.body if isinstance(node, ast.Lambda) else node)
        for node in _read_entries(_TEMPLATES, 80)
    )


def _read_entries(name: str, count: int) -> list[ast.expr]:
    for node in _parse_file(_find_file()).body:
        if (
            isinstance(node, ast.Assign)
            and any(isinstance(target, ast.Name) and target.id == name for target in node.targets)
            and isinstance(node.value, ast.Tuple | ast.List)
            and len(node.value.elts) == count
        ):
            return node.value.elts
    raise _unknown_form(name)


def _read_string(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(_read_string, parts))
        case ast.FormattedValue(value=ast.Name(), conversion=-1, format_spec=None):
            return PLACEHOLDER
    raise _unknown_form(type(node).__name__)


def _unknown_form(what: str) -> InputError:
    return InputError(
        f"{_find_file()} holds '{what}' in a form that is not known here: install a version of "
        "open_clip_torch from 2.32 on and below 4, or give prompts of your own"
    )


def _find_file() -> Path:
    path = package_file(_FILE)
    if path is None:
        raise InputError(
            f"ImageNet's prompts, {_FILE}, were not found: install open_clip_torch, which ships it"
        )
    return path


@functools.cache
def _parse_file(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))
