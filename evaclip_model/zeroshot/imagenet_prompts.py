"""ImageNet's class names and prompts, read from open_clip_torch's source without running it: an
InputError where that is not installed, or keeps them in another form."""

import ast
import functools

from evaclip_model.errors import InputError
from evaclip_model.tokenizer.bundled_assets import package_file

PLACEHOLDER = "{c}"
"""Stands in a template for the class name."""

_FILE = "zero_shot_metadata.py"


@functools.cache
def imagenet_classnames() -> tuple[str, ...]:
    """The 1000 class names, in the order of ImageNet's class ids (sorted folder names)."""
    return _read_strings("IMAGENET_CLASSNAMES", 1000)


@functools.cache
def imagenet_templates() -> tuple[str, ...]:
    """The 80 prompts, each with one `{c}` for the class name (Radford et al. 2021)."""
    return _read_strings("OPENAI_IMAGENET_TEMPLATES", 80)


def _read_strings(name: str, count: int) -> tuple[str, ...]:
    """The list of this name: strings, or functions from the class name to an f-string."""
    if (path := package_file(_FILE)) is None:
        raise InputError(
            f"ImageNet's prompts, {_FILE}, were not found: install open_clip_torch, which ships it"
        )
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign(
                targets=[ast.Name(id=found)], value=ast.Tuple(elts=parts) | ast.List(elts=parts)
            ) if found == name and len(parts) == count:
                strings = tuple(filter(None, map(_read_string, parts)))
                if len(strings) == count:
                    return strings
    raise InputError(
        f"{path} holds '{name}' in a form that is not known here: install a version of "
        "open_clip_torch from 2.32 on and below 4, or give prompts of your own"
    )


def _read_string(node: ast.expr) -> str | None:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.Lambda(body=ast.JoinedStr(values=parts)):
            return "".join(
                str(part.value) if isinstance(part, ast.Constant) else PLACEHOLDER for part in parts
            )
    return None
