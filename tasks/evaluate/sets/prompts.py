"""Class names and prompt templates of a set, each from a source that the recipe names.

There is no source of last resort: a set whose source lacks it is an error, because a figure under
other prompts looks like any other figure.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from evaclip_model.errors import InputError
from evaclip_model.tokenizer.bundled_assets import package_file
from evaclip_model.zeroshot.imagenet_prompts import (
    PLACEHOLDER,
    imagenet_classnames,
    imagenet_templates,
)
from evaclip_model.zeroshot.set_layout import CLASSNAMES, TEMPLATES, read_lines
from tasks.evaluate.sets.set_registry import KnownSet, NameSource, PromptSource

WHEEL = "clip_benchmark"
"""Importable name of the distribution clip-benchmark."""
_GRAMMAR = Path(__file__).with_name("grammar_templates.json")
_SUBSETS = {"imagenet-a": "imagenet_a_indices.txt", "imagenet-r": "imagenet_r_indices.txt"}


def find_templates(
    name: str, source: PromptSource | Sequence[str], known: KnownSet | None, folder: Path
) -> tuple[str, ...]:
    """Templates of a set, each with `{c}` for the class name, in the order of their source. Raises
    InputError: no such source, it has none for this set, or one of them has no `{c}`."""
    if not isinstance(source, str):
        found = tuple(source)
    elif source == "dataset":
        found = read_lines(folder / TEMPLATES, f"one prompt template with {PLACEHOLDER} a line")
    elif source == "openai":
        found = imagenet_templates()
    elif source == "grammar":
        found = grammar_templates(known.key if known else name)
    elif source == "clip_benchmark":
        file = "en_zeroshot_classification_templates.json"
        found = _from_wheel(file, known.wheel_prompts if known else None, name)
    else:
        sources = ", ".join(get_args(PromptSource))
        raise InputError(f"'{source}' is not a source of prompt templates: give one of {sources}")
    where = str(folder / TEMPLATES) if source == "dataset" else f"set '{name}'"
    return require_placeholder(found, where)


def require_placeholder(templates: tuple[str, ...], where: str) -> tuple[str, ...]:
    """Return the templates, if each has `{c}` for the class name and none is a list of several."""
    for template in templates:
        if PLACEHOLDER not in template or template.startswith(('["', '{"')):
            raise InputError(
                f"{where}: template '{template}' has no {PLACEHOLDER} for the class name, or is "
                "JSON: write one a line"
            )
    return templates


def find_classnames(
    name: str, source: NameSource | Sequence[str], known: KnownSet | None, folder: Path
) -> tuple[str, ...]:
    """Class names of a set, by label. Raises InputError: the source has none for this set."""
    if not isinstance(source, str):
        return tuple(source)
    if source == "dataset":
        return read_lines(folder / CLASSNAMES, "one class name a line")
    if source == "clip_benchmark":
        return _from_wheel("en_classnames.json", known.wheel_names if known else None, name)
    names = imagenet_classnames()
    return tuple(names[index] for index in subset_classes(known)) or names


def grammar_templates(key: str) -> tuple[str, ...]:
    """OpenAI's templates made of a few words. Raises InputError: this set's are not."""
    lists = json.loads(_GRAMMAR.read_text())
    kind = "kinetics" if key.startswith("kinetics") else key
    if kind not in lists:
        raise InputError(
            f"set '{key}' has no templates built by a grammar: UCF-101, Kinetics, RESISC45 and "
            "Birdsnap have"
        )
    return tuple(lists[kind])


@functools.cache
def subset_classes(known: KnownSet | None) -> tuple[int, ...]:
    """Indices, rising, of a set's classes among ImageNet's 1000; none where it has no such subset.
    Raises InputError: the installed timm has these lists in another form."""
    if known is None or known.subset_of is None:
        return ()
    classes = tuple(int(line) for line in _timm_lines(_SUBSETS[known.key]))
    if len(classes) != known.classes or list(classes) != sorted(set(classes)):
        raise InputError(
            f"timm's {_SUBSETS[known.key]} does not list {known.classes} classes in order: "
            "install a version of timm from 1.0 on and below 2"
        )
    return classes


@functools.cache
def imagenet_synsets() -> tuple[str, ...]:
    """WordNet ids of ImageNet's 1000 classes, by label. Raises InputError: timm is missing."""
    return _timm_lines("imagenet_synsets.txt")


def _from_wheel(file: str, key: str | None, name: str) -> tuple[str, ...]:
    if (path := package_file(f"datasets/{file}", WHEEL)) is None:
        raise InputError(
            f"set '{name}': its list comes from the distribution clip-benchmark, which is not "
            "installed: `pip install --no-deps clip-benchmark`, or name another source"
        )
    lists = json.loads(path.read_text(encoding="utf-8"))
    if key is None or key not in lists:
        raise InputError(f"set '{name}' has no list in {path}: name another source")
    return tuple(lists[key])


def _timm_lines(file: str) -> tuple[str, ...]:
    if (path := package_file(f"data/_info/{file}", "timm")) is None:
        raise InputError(f"ImageNet's classes, timm's {file}, were not found: install timm")
    return tuple(path.read_text().split())
